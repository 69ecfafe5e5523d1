"""Syncs of fragments of the model, at once or landing later, follow `reference.py`; nothing of them is lost or counted
twice.
"""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lordo_ds import LoRDO, LordoConfig
from lordo_ds.core.grouping import plan_parameters
from lordo_ds.core.reference import Reference
from tests import problems
from tests.cases import Found, once, run_cases

pytestmark = pytest.mark.distributed

STEPS = 17
DTYPE = torch.float64
BASE: dict[str, Any] = {
    "lr": 1e-2,
    "eps": 1e-2,
    "weight_decay": 0.1,
    "rank": 3,
    "sync_interval": 7,
    "max_nonfinite_syncs": 99,
    "max_left_out_syncs": "never",
}
MODES: dict[str, dict[str, Any]] = {
    "paper": {},
    "recommended": {"preset": "recommended"},
    "int8": {"pseudo_gradient_dtype": "int8", "preset": "recommended"},
    "owners": {"preset": "recommended", "outer": {"compute": "owner"}},
    "owners_int8": {"pseudo_gradient_dtype": "int8", "outer": {"lr": 0.7, "momentum": 0.7, "compute": "owner"}},
    "momentum": {"outer": {"lr": 0.7, "momentum": 0.7}, "average_dense_moments": True, "error_feedback": "fp32"},
    "warm_up": {"sync_warmup_steps": 4, "moment_sync_interval": [7, 14], "qh_mode": "factored"},
    "local": {"projection": "local", "qh_mode": "factored"},
    "local_int8": {"projection": "local", "pseudo_gradient_dtype": "int8"},
    "complement": {"basis_source": "complement", "error_feedback": "fp32", "basis_update": "svd"},
    "no_moments": {"moment_sync_interval": "never"},
}
SHAPES = [(1, 1), (1, 3), (2, 0), (2, 1), (2, 3), (3, 0), (3, 1)]  # fragments, delay
# The first three modes in every shape, the others in two.
CASES = [(mode, *shape) for i, mode in enumerate(MODES) for shape in (SHAPES if i < 3 else [(2, 3), (3, 1)])]
Faults = frozenset[tuple[int, int]]  # (attempted step, replica)


def named_parameters(dtype: torch.dtype = DTYPE) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, torch.nn.Parameter(w)) for name, w in problems.initial_weights(dtype).items()]


def settings_of(mode: str, fragments: int, delay: int) -> dict[str, Any]:
    return {**BASE, **MODES[mode], "streaming": {"fragments": fragments, "delay_steps": delay}}


def farthest(settings: dict[str, Any], skips: Faults, nans: Faults) -> dict[str, float]:
    """The largest distance of this replica from the reference at any step, of each kind; and how often it synced."""
    logging.getLogger("lordo_ds").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    replica, replicas = dist.get_rank(), dist.get_world_size()
    named = named_parameters()
    optimizer = LoRDO(named, **settings)
    optimizer._attach_alone()
    optimizer.managed = True  # the engine's way: step() where a step is executed, end_attempt() always
    config = LordoConfig.parse(settings)
    plans = plan_parameters(config, problems.facts())
    reference = Reference(config, plans, [problems.initial_weights(DTYPE) for _ in range(replicas)])
    worst = {"weight": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0, "step": 0.0, "executed": 0.0}
    returned = 0
    for step in range(1, STEPS + 1):
        gradients = problems.faulty_gradients(step, replicas, DTYPE, skips, nans)
        mine = gradients[replica]
        if mine is not None:
            for name, parameter in named:
                parameter.grad = mine[name].clone()
            optimizer.step()
        optimizer.end_attempt()
        reference.step(gradients)
        returned += optimizer.synced and optimizer.last_report.returned_to_anchor  # type: ignore[union-attr]
        worst["executed"] += abs(optimizer.executed_steps - reference.executed[replica])
        for name, parameter in named:
            kept, S = optimizer.state[parameter][name], reference.state[replica][name]
            for key, ours, theirs in (
                ("weight", parameter.detach(), reference.weights[replica][name]),
                ("exp_avg", kept["exp_avg"].flatten(), S["u"].flatten()),
                ("exp_avg_sq", kept["exp_avg_sq"].flatten(), S["v"].flatten()),
            ):
                # The sign of a basis's column is a convention: moments are compared by their size.
                ours, theirs = (ours, theirs) if key == "weight" else (ours.norm(), theirs.norm())
                off = (ours - theirs).abs()
                off = torch.where(torch.isnan(ours) & torch.isnan(theirs), torch.zeros_like(off), off)
                worst[key] = max(worst[key], float(off.nan_to_num(nan=1e9).max()))
            worst["step"] += abs(kept["step"] - S["t"])
    assert optimizer.sync is not None
    return {**worst, "syncs": optimizer.sync.syncs, "left_out": optimizer.sync.left_out_syncs, "returned": returned}


def drawn_faults(seed: int, replicas: int) -> tuple[Faults, Faults]:
    draw = random.Random(seed)
    everywhere = [(step, m) for step in range(1, STEPS + 1) for m in range(replicas)]
    skips = frozenset(one for one in everywhere if draw.random() < 0.2)
    # Of two replicas at once every other time: too few are left then.
    nans = frozenset((step, m) for step, m in everywhere if m in (1, 1 + seed % 2) and draw.random() < 0.1)
    return skips, nans


@once
def without_faults() -> Found[Any]:
    cases = {case: (settings_of(*case), frozenset(), frozenset()) for case in CASES}
    return run_cases(farthest, 2, cases, timeout_s=240)


@once
def of_one_replica() -> Found[Any]:
    skips = frozenset({(4, 0), (9, 0), (10, 0)})
    cases = {mode: (settings_of(mode, 3, 2), skips, frozenset()) for mode in ("paper", "recommended", "local")}
    return run_cases(farthest, 1, cases, timeout_s=120)


@once
def with_faults() -> Found[Any]:
    cases = {case: (settings_of(*case), *drawn_faults(seed, 3)) for seed, case in enumerate(CASES)}
    return run_cases(farthest, 3, cases, timeout_s=280)


def require_near(found: list[dict[str, float]]) -> None:
    for one in found:
        off = {key: value for key, value in one.items() if key not in ("syncs", "left_out", "returned")}
        assert all(value < 1e-6 for value in off.values()), off


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fragments_and_delays_follow_the_reference(case: tuple[str, int, int]) -> None:
    found = without_faults()[case]
    require_near(found)
    assert all(one["syncs"] >= 2 * case[1] and not one["left_out"] for one in found)


@pytest.mark.parametrize("mode", ["paper", "recommended", "local"])
def test_one_replica_streams_its_outer_step_and_its_bases(mode: str) -> None:
    require_near(of_one_replica()[mode])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_skipped_steps_and_replicas_that_are_not_finite_follow_the_reference(case: tuple[str, int, int]) -> None:
    require_near(with_faults()[case])


def test_the_faults_leave_replicas_out_and_sometimes_too_few_in() -> None:
    found = with_faults()
    assert sum(found[case][0]["left_out"] for case in found) > len(CASES) // 2
    assert sum(found[case][0]["returned"] for case in found) > 3
