"""Which attempted steps end in a sync, and what each of them does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lordo_ds import LoRDO
from lordo_ds.config import LordoConfig
from lordo_ds.core import schedule
from lordo_ds.core.schedule import SyncPlan, final_plan, steps_until_sync, sync_plan

OUTER = {"lr": 0.7, "momentum": 0.7}


def due_steps(until: int, **params: Any) -> list[int]:
    config = LordoConfig.parse(params)
    return [step for step in range(1, until + 1) if sync_plan(config, step).due]


def steps_where(what: str, until: int, **params: Any) -> list[int]:
    config = LordoConfig.parse(params)
    return [step for step in range(1, until + 1) if getattr(sync_plan(config, step), what)]


def test_every_k_th_attempted_step_is_due() -> None:
    assert due_steps(13, sync_interval=4) == [4, 8, 12]
    assert due_steps(3, sync_interval=1) == [1, 2, 3]


def test_warm_up_syncs_every_step_and_then_due_steps_are_multiples_of_k_again() -> None:
    assert due_steps(16, sync_interval=5, sync_warmup_steps=7) == [1, 2, 3, 4, 5, 6, 7, 10, 15]
    assert due_steps(9, sync_interval=4, sync_warmup_steps=4) == [1, 2, 3, 4, 8]


def test_warm_up_refreshes_the_basis_only_at_multiples_of_k() -> None:
    assert steps_where("refresh_basis", 16, sync_interval=5, sync_warmup_steps=7) == [5, 10, 15]


def test_warm_up_averages_plainly_whatever_the_outer_optimizer() -> None:
    params = {"sync_interval": 5, "sync_warmup_steps": 7}
    assert steps_where("plain_average", 16, **params, outer=OUTER) == [1, 2, 3, 4, 5, 6, 7]
    assert steps_where("plain_average", 16, **params) == [1, 2, 3, 4, 5, 6, 7, 10, 15]
    assert steps_where("plain_average", 8, sync_interval=4, outer={"lr": 0.5}) == []


@pytest.mark.parametrize(
    ("interval", "exp_avg", "exp_avg_sq"),
    [
        (None, [3, 6, 9, 12], [3, 6, 9, 12]),
        (6, [6, 12], [6, 12]),
        ([3, 9], [3, 6, 9, 12], [9]),
        ([12, 6], [12], [6, 12]),
        ("never", [], []),
    ],
)
def test_moments_are_averaged_at_their_own_intervals(interval: Any, exp_avg: list[int], exp_avg_sq: list[int]) -> None:
    params = {"sync_interval": 3, "moment_sync_interval": interval}
    assert steps_where("average_exp_avg", 14, **params) == exp_avg
    assert steps_where("average_exp_avg_sq", 14, **params) == exp_avg_sq


def test_warm_up_averages_the_moments_at_every_step() -> None:
    params = {"sync_interval": 4, "sync_warmup_steps": 3, "moment_sync_interval": 8}
    assert steps_where("average_exp_avg", 16, **params) == [1, 2, 3, 8, 16]


@pytest.mark.parametrize("warm_up", [0, 5])
def test_local_projection_never_averages_moments(warm_up: int) -> None:
    params = {"sync_interval": 2, "projection": "local", "sync_warmup_steps": warm_up}
    assert steps_where("average_exp_avg", 12, **params) == []
    assert steps_where("average_exp_avg_sq", 12, **params) == []
    assert steps_where("refresh_basis", 6, **params) == [2, 4, 6]


def test_between_syncs_nothing_is_done() -> None:
    assert sync_plan(LordoConfig.parse({"sync_interval": 4}), 3) == SyncPlan(due=False)


def test_a_final_sync_is_due_at_any_step_and_plain_only_as_a_regular_one_would_be() -> None:
    config = LordoConfig.parse({"sync_interval": 4, "outer": OUTER, "sync_warmup_steps": 2})
    assert final_plan(config, 7).due and not final_plan(config, 7).plain_average
    assert final_plan(config, 8) == sync_plan(config, 8)
    assert final_plan(config, 2).plain_average


@settings(max_examples=50, deadline=None)
@given(interval=st.integers(1, 12), warm_up=st.integers(0, 30), step=st.integers(0, 60))
def test_steps_until_the_next_sync_counts_to_the_first_due_step_after_this_one(
    interval: int, warm_up: int, step: int
) -> None:
    config = LordoConfig.parse({"sync_interval": interval, "sync_warmup_steps": warm_up})
    ahead = next(n for n in range(1, interval + 1) if sync_plan(config, step + n).due)
    assert steps_until_sync(config, step) == ahead


def test_the_plan_of_an_attempted_step_is_made_once_for_all_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the step in hand: a load that sets the run back has its plans made anew."""
    made: list[int] = []
    monkeypatch.setattr(schedule, "sync_plan", lambda config, step: made.append(step) or sync_plan(config, step))
    parameters = [(f"w{i}", torch.nn.Parameter(torch.eye(4 + i))) for i in range(3)]
    optimizer = LoRDO(parameters, rank=2, sync_interval=2)
    for step in range(1, 6):
        for i, (_, parameter) in enumerate(parameters):
            parameter.grad = torch.arange(1.0, (4 + i) ** 2 + 1).sin().view(4 + i, -1)
        optimizer.step()
        if step == 3:
            saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert made == [1, 2, 3, 4, 5, 4]
    assert optimizer.synced and optimizer.attempted_steps == 4
