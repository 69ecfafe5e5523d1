"""Skipped steps, non-finite gradients and losses, under settings drawn at random: replicas follow `reference.py`."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Set as AbstractSet
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lordo_ds import LoRDO, LordoConfig
from lordo_ds.core.grouping import plan_parameters
from lordo_ds.core.reference import Reference
from lordo_ds.errors import SyncError
from tests import problems
from tests.ranks import run_ranks

STEPS = 9
DTYPE = torch.float64
OUTERS: list[dict[str, Any]] = [
    {},
    {"lr": 0.7, "momentum": 0.7},
    {"lr": 0.5, "momentum": 0.3, "nesterov": False},
    {"momentum": 0.5, "orthogonalize": True},
    {"momentum": 0.5, "orthogonalize": True, "residual_gain": 2.0},
    {"momentum": 0.5, "orthogonalize": True, "residual_gain": 2.0, "compute": "owner"},
    {"lr": 0.7, "momentum": 0.7, "compute": "owner"},
    {"compute": "owner"},
]
Faults = AbstractSet[tuple[int, int]]  # (attempted step, replica)


def drawn_settings(draw: random.Random) -> dict[str, Any]:
    interval = draw.choice([1, 2, 3, 4])
    settings = {
        "lr": 1e-2,
        "eps": 1e-2,
        "weight_decay": draw.choice([0.0, 0.1]),
        "rank": draw.choice([1, 2, 3, "1/2", 64]),
        "sync_interval": interval,
        "moment_sync_interval": draw.choice([None, "never", [interval, 2 * interval], [2 * interval, interval]]),
        "sync_warmup_steps": draw.choice([0, 0, 3]),
        "qh_mode": draw.choice(["full_rank", "factored", "low_rank", "none"]),
        "omega": draw.choice([0.0, 0.3, 0.9]),
        "error_feedback": draw.choice([False, "fp32"]),
        "basis_source": draw.choice(["pseudo_gradient", "complement", "gradient"]),
        "basis_update": draw.choice(["power", "eigh", "svd"]),
        "projection": draw.choice(["global", "global", "local"]),
        "average_dense_moments": draw.choice([True, False]),
        "outer": draw.choice(OUTERS),
        "max_nonfinite_syncs": 99,
        "max_left_out_syncs": "never",
        "min_participants": draw.choice(["1/2", 1, 2]),
        "pseudo_gradient_dtype": draw.choice(["fp32", "fp32", "int8", {"top_k": 8, "block": 64}]),
    }
    if settings["projection"] == "local":
        settings["outer"] = {key: value for key, value in settings["outer"].items() if key != "residual_gain"}
    if settings["projection"] == "local" or settings["basis_source"] == "gradient":
        settings["outer"] = {key: value for key, value in settings["outer"].items() if key != "compute"}
    if settings["basis_source"] == "complement" and settings["qh_mode"] in ("low_rank", "none"):
        settings["qh_mode"] = "full_rank"
    return settings


def first_difference(settings: dict[str, Any], skips: Faults, nans: Faults, losses: Faults = frozenset()) -> str:
    """Where this rank first leaves the reference, "" if nowhere. Skipping is what an fp16 overflow does.

    Args:
        losses: where the loss is not finite, and nothing else.
    """
    replica, replicas = dist.get_rank(), dist.get_world_size()
    named = [(name, torch.nn.Parameter(w)) for name, w in problems.initial_weights(DTYPE).items()]
    optimizer = LoRDO(named, **settings)
    optimizer._attach_alone()
    optimizer.managed = True  # the engine's way: step() where a step is executed, end_attempt() always
    config = LordoConfig.parse(settings)
    plans = plan_parameters(config, problems.facts())
    reference = Reference(config, plans, [problems.initial_weights(DTYPE) for _ in range(replicas)])
    found = ""
    for step in range(1, STEPS + 1):
        gradients = problems.faulty_gradients(step, replicas, DTYPE, skips, nans)
        mine = gradients[replica]
        if mine is not None:
            for name, parameter in named:
                parameter.grad = mine[name].clone()
            optimizer.step()
        optimizer.end_attempt()
        step_losses = [float("inf") if (step, m) in losses else 1.0 for m in range(replicas)]
        if optimizer.last_attempt_executed:
            optimizer.sync.faults.note_loss(step_losses[replica], step)
        reference.step(gradients, losses=step_losses)
        for name, parameter in named:
            ours, theirs = parameter.detach(), reference.weights[replica][name]
            if not torch.allclose(ours, theirs, rtol=0, atol=1e-6, equal_nan=True):
                found = found or f"{name} at step {step} on replica {replica}: {(ours - theirs).abs().max():.1e}"
            counts = optimizer.state[parameter][name]["step"], reference.state[replica][name]["t"]
            if counts[0] != counts[1]:
                found = found or f"{name} at step {step} on replica {replica}: t is {counts[0]}, not {counts[1]}"
    return found


def differences_of_draws(seeds: range) -> dict[str, str]:
    torch.set_num_threads(1)
    logging.getLogger("lordo_ds").setLevel(logging.CRITICAL)
    found = {}
    for seed in seeds:
        draw = random.Random(seed)
        settings = drawn_settings(draw)
        everywhere = [(step, m) for step in range(1, STEPS + 1) for m in range(dist.get_world_size())]
        skips = {place for place in everywhere if draw.random() < 0.25}
        nans = {place for place in everywhere if seed % 2 and draw.random() < 0.12}
        losses = {place for place in everywhere if seed % 3 == 0 and draw.random() < 0.12}
        what = f"{settings}, skips {sorted(skips)}, nans {sorted(nans)}, losses {sorted(losses)}"
        found[what] = first_difference(settings, skips, nans, losses)
    return found


@pytest.mark.distributed
def test_skips_and_non_finite_gradients_under_settings_drawn_at_random_follow_the_reference() -> None:
    for differences in run_ranks(differences_of_draws, 2, seeds=range(24), timeout_s=240):
        for what, difference in differences.items():
            assert not difference, f"{difference}, with {what}"


@pytest.mark.distributed
def test_three_replicas_under_faults_drawn_at_random_follow_the_reference() -> None:
    """One finite replica of three is fewer than half of them: no average then."""
    for differences in run_ranks(differences_of_draws, 3, seeds=range(100, 112), timeout_s=240):
        for what, difference in differences.items():
            assert not difference, f"{difference}, with {what}"


def counts_and_end(settings: dict[str, Any], nans: Faults, losses: Faults) -> dict[str, Any]:
    """How often each replica was left out, and what stopped the run."""
    logging.getLogger("lordo_ds").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    replica = dist.get_rank()
    named = [(name, torch.nn.Parameter(w)) for name, w in problems.initial_weights(DTYPE).items()]
    optimizer = LoRDO(named, **{"lr": 1e-2, "eps": 1e-2, "rank": 2, "sync_interval": 1, **settings})
    error = ""
    for step in range(1, STEPS + 1):
        scale = float("nan") if (step, replica) in nans else 1.0
        for name, parameter in named:
            parameter.grad = scale * problems.gradients(step, replica, DTYPE)[name]
        try:
            optimizer.step()
        except SyncError as raised:
            error = str(raised)
            break
        optimizer.sync.faults.note_loss(float("nan") if (step, replica) in losses else 1.0, step)
    weights = [parameter.detach().clone() for _, parameter in named]
    return {"left_out": optimizer.sync.faults.left_out, "step": step, "error": error, "weights": weights}


@pytest.mark.distributed
def test_a_replica_left_out_too_often_in_a_row_stops_the_run_by_name() -> None:
    nans = {(step, 1) for step in (2, 3, 5, 6, 7)}
    for found in run_ranks(counts_and_end, 2, {"max_left_out_syncs": 3}, nans, set(), timeout_s=60):
        assert found["step"] == 7 and found["left_out"] == [0, 5]
        assert "replica 1 was not finite at 3 syncs in a row, the last at step 7" in found["error"]
    for found in run_ranks(counts_and_end, 2, {"max_left_out_syncs": "never"}, nans, set(), timeout_s=60):
        assert not found["error"] and found["step"] == STEPS


@pytest.mark.distributed
def test_too_few_finite_replicas_stop_the_run_with_the_reason() -> None:
    nans = {(step, m) for step in (4, 5) for m in (0, 2)}
    settings = {"min_participants": 2, "max_nonfinite_syncs": 2}
    for found in run_ranks(counts_and_end, 3, settings, nans, set(), timeout_s=60):
        assert found["step"] == 5 and found["left_out"] == [2, 0, 2]
        assert "only 1 of 3 replicas was finite at 2 syncs in a row" in found["error"]
        assert "min_participants = 2" in found["error"]


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_keeps_its_replica_out_of_one_sync() -> None:
    """Its state is finite, and yet nobody learns from it; all replicas end equal."""
    ends = run_ranks(counts_and_end, 2, {}, set(), {(3, 1)}, timeout_s=60)
    others = run_ranks(counts_and_end, 2, {}, set(), set(), timeout_s=60)
    for found, other in zip(ends, others, strict=True):
        assert found["left_out"] == [0, 1] and not found["error"]
        assert all(torch.equal(a, b) for a, b in zip(found["weights"], ends[0]["weights"], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(found["weights"], other["weights"], strict=True))


@pytest.mark.distributed
def test_a_first_step_that_no_replica_could_use_is_not_applied_when_a_replica_skips_the_second() -> None:
    """It waited for its basis, which came a step later from the other replica, and was then applied: NaN."""
    settings = {"lr": 1e-2, "eps": 1e-2, "rank": 2, "sync_interval": 4, "low_rank": {"exclude": ["bias"]}}
    nans = {(1, 0), (1, 1)}
    found = run_ranks(first_difference, 2, settings=settings, skips={(2, 0)}, nans=nans, timeout_s=60)
    assert found == ["", ""]


@pytest.mark.distributed
def test_the_second_moment_may_be_averaged_more_often_than_the_first() -> None:
    """Re-expressing v mixes in each replica's own u, so v then differs by right: no reason to stop the run."""
    settings = {"lr": 1e-2, "eps": 1e-2, "rank": 2, "sync_interval": 2, "moment_sync_interval": [4, 2]}
    assert run_ranks(first_difference, 2, settings=settings, skips=set(), nans=set(), timeout_s=60) == ["", ""]


# -- replicas of two ranks that hold the same, without an engine ------------------------------------


def twins(least: int, start_apart: str = "") -> dict[str, Any]:
    """Two replicas of two ranks; unless ranks or replicas start apart, one's state breaks before sync 2."""
    torch.set_num_threads(1)
    rank = dist.get_rank()
    seed = {"": 0, "ranks": rank, "replicas": rank // 2}[start_apart]
    weight = torch.nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)))
    optimizer = LoRDO(
        [("a.weight", weight)], lr=1e-2, rank=2, sync_interval=2, replica_size=2, min_participants=least,
        sync_timeout_s=60,
    )  # fmt: skip
    participants, returned = [], []
    for step in range(1, 7):
        weight.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(100 * step + rank // 2))
        optimizer.step()
        if step == 3 and rank == 1 and not start_apart:
            assert optimizer.sync is not None
            optimizer.sync.items[0].state["exp_avg"].fill_(math.nan)
        if optimizer.synced:
            assert optimizer.last_report is not None
            participants.append(optimizer.last_report.participants)
            returned.append(optimizer.last_report.returned_to_anchor)
    assert optimizer.sync is not None
    sent = optimizer.sync.wire.ledger.by_kind
    return {"participants": participants, "returned": returned, "weight": weight.detach().clone(), "sent": dict(sent)}


@pytest.mark.parametrize(("least", "participants", "returned"), [(1, [2, 1, 2], False), (2, [2, 0, 2], True)])
def test_ranks_that_hold_the_same_agree_on_who_takes_part(least: int, participants: list[int], returned: bool) -> None:
    found = run_ranks(twins, 4, least, timeout_s=120)
    for each in found:
        assert each["participants"] == participants and each["returned"] == [False, returned, False]
        assert bool(torch.isfinite(each["weight"]).all()) and torch.equal(each["weight"], found[0]["weight"])
    # The replica that was left out gets basis and moments of rank 2 in fp32 once, from the ranks of the other together.
    reseeded = 0 if returned else 4 * 2 * (6 + 8 + 8)
    assert [each["sent"].get("reseed", 0) for each in found] == [0, 0, reseeded // 2, reseeded // 2]


@pytest.mark.parametrize("start_apart", ["ranks", "replicas"])
def test_ranks_that_hold_the_same_start_from_the_same_weights(start_apart: str) -> None:
    found = run_ranks(twins, 4, 1, start_apart, timeout_s=120)
    assert all(torch.equal(each["weight"], found[0]["weight"]) for each in found)
    # A checksum of 8 bytes from each; the weights once, from the ranks of replica 0 together.
    start = [each["sent"]["start"] for each in found]
    assert start == [6 * 8 * 4 // 2 + 8] * 2 + [8] * 2
