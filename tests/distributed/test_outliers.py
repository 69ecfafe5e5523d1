"""A replica that is finite and wrong is left out of the average and reseeded, as the reference says; honest ones never.

One exponent bit flipped in a weight, moment or row mean of one replica put weights of 1e5 into all of them.
"""

from __future__ import annotations

import logging
import math
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lordo_ds import LoRDO, LordoConfig
from lordo_ds.core.grouping import plan_parameters
from lordo_ds.core.reference import Reference
from lordo_ds.errors import SyncError
from lordo_ds.sync.outliers import SIZES, far_from_others
from tests import problems
from tests.distributed.test_faults_follow_the_reference import drawn_settings
from tests.ranks import run_ranks

STEPS = 12
DTYPE = torch.float64
# What is hit, as the optimizer and the reference call it.
KINDS = {"weight": "", "exp_avg": "u", "exp_avg_sq": "v", "row_mean_sq": "row"}
HIT = "long"
EXPONENTS = (16, 32, 64, -64)
Flips = dict[tuple[int, int], tuple[str, int]]  # (step, replica): (kind, which power of two)


def flip_(tensor: Tensor, power: int) -> None:
    """One exponent bit of one element."""
    tensor.view(-1)[1] *= 2.0**power


def first_difference(settings: dict[str, Any], flips: Flips, skips: set[tuple[int, int]]) -> dict[str, Any]:
    """Where this rank first leaves the reference, and how far weights went. Hit at the start of a step."""
    replica, replicas = dist.get_rank(), dist.get_world_size()
    named = [(name, torch.nn.Parameter(w)) for name, w in problems.initial_weights(DTYPE).items()]
    optimizer = LoRDO(named, **settings)
    optimizer._attach_alone()
    optimizer.managed = True
    config = LordoConfig.parse(settings)
    plans = plan_parameters(config, problems.facts())
    reference = Reference(config, plans, [problems.initial_weights(DTYPE) for _ in range(replicas)])
    found, largest = "", 0.0
    assert optimizer.sync is not None
    for step in range(1, STEPS + 1):
        for (when, m), (kind, power) in flips.items():
            if when != step:
                continue
            state, key = reference.state[m][HIT], KINDS[kind]
            flip_(state[key] if key else reference.weights[m][HIT], power)
            if m == replica:
                parameter = dict(named)[HIT]
                flip_(optimizer.state[parameter][HIT][kind] if key else parameter.data, power)
        gradients = [None if (step, m) in skips else problems.gradients(step, m, DTYPE) for m in range(replicas)]
        own = gradients[replica]
        if own is not None:
            for name, parameter in named:
                parameter.grad = own[name].clone()
            optimizer.step()
        optimizer.end_attempt()
        reference.step(gradients)
        for name, parameter in named:
            ours, theirs = parameter.detach(), reference.weights[replica][name]
            if not torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6):
                found = found or f"{name} at step {step} on replica {replica}: {(ours - theirs).abs().max():.1e}"
            if optimizer.synced:
                largest = max(largest, float(ours.abs().max()))
    faults = optimizer.sync.faults
    return {"difference": found, "as_outlier": faults.as_outlier, "left_out": faults.left_out, "largest": largest}


def differences_of_draws(seeds: range) -> dict[str, Any]:
    torch.set_num_threads(1)
    logging.getLogger("lordo_ds").setLevel(logging.CRITICAL)
    found = {}
    for seed in seeds:
        draw = random.Random(seed)
        settings = drawn_settings(draw) | {"sync_interval": 3, "moment_sync_interval": None}
        kinds = [kind for kind in KINDS if kind != "row_mean_sq" or settings["qh_mode"] == "factored"]
        flips: Flips = {}
        for _ in range(2):
            place = draw.randrange(2, STEPS), draw.randrange(dist.get_world_size())
            flips[place] = draw.choice(kinds), draw.choice(EXPONENTS)
        everywhere = [(step, m) for step in range(1, STEPS + 1) for m in range(dist.get_world_size())]
        skips = {place for place in everywhere if seed % 2 and draw.random() < 0.1}
        found[f"{settings}, {flips}, skips {sorted(skips)}"] = first_difference(settings, flips, skips)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("replicas", [2, 3])
def test_flipped_bits_under_settings_drawn_at_random_follow_the_reference(replicas: int) -> None:
    counted = 0
    for found in run_ranks(differences_of_draws, replicas, seeds=range(10), timeout_s=240):
        for what, one in found.items():
            assert not one["difference"], f"{one['difference']}, with {what}"
            counted += sum(one["as_outlier"])
    assert counted > 5 * replicas


# -- named, counted, restored ------------------------------------------------------------------------

ALONE = {"lr": 1e-2, "eps": 1e-2, "rank": 2, "sync_interval": 3, "outer": {"lr": 0.7, "momentum": 0.5}}


def hit_run(what: str = "", power: int = 32, steps: int = 9, every: int = 0, **settings: Any) -> dict[str, Any]:
    """Alone, in fp32; replica 1 is hit after step 4, and again after every `every` steps."""
    torch.set_num_threads(1)
    replica = dist.get_rank()
    named = [(name, torch.nn.Parameter(w)) for name, w in problems.initial_weights(torch.float32).items()]
    optimizer = LoRDO(named, **{**ALONE, **settings})
    error, outliers, participants = "", {}, []
    for step in range(1, steps + 1):
        for name, parameter in named:
            parameter.grad = problems.gradients(step, replica, torch.float32)[name]
        try:
            optimizer.step()
        except SyncError as raised:
            error = str(raised)
            break
        report = optimizer.last_report
        if optimizer.synced and report is not None:
            outliers |= {step: report.outliers} if report.outliers else {}
            participants.append(report.participants)
        if what and replica == 1 and (step == 4 or (every and step > 4 and (step - 4) % every == 0)):
            parameter = dict(named)[HIT]
            flip_(parameter.data if what == "weight" else optimizer.state[parameter][HIT][what], power)
    assert optimizer.sync is not None
    return {
        "error": error,
        "step": step,
        "outliers": outliers,
        "participants": participants,
        "as_outlier": optimizer.sync.faults.as_outlier,
        "left_out": optimizer.sync.faults.left_out,
        "weights": torch.cat([parameter.detach().flatten() for _, parameter in named]),
        "anchor": optimizer.state[dict(named)[HIT]][HIT]["anchor"].clone(),
    }


def hits(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    logging.getLogger("lordo_ds").setLevel(logging.CRITICAL)
    return {name: hit_run(**case) for name, case in cases.items()}


CASES: dict[str, dict[str, Any]] = {
    "honest": {},
    "weight": {"what": "weight", "power": 16},
    "weight, not looked for": {"what": "weight", "power": 32, "max_outlier": "never"},
    "exp_avg": {"what": "exp_avg"},
    "exp_avg_sq": {"what": "exp_avg_sq"},
    "row_mean_sq": {"what": "row_mean_sq", "qh_mode": "factored"},
    "anchor": {"what": "anchor", "power": 16},
    "anchor a little": {"what": "anchor", "power": 1},
    "outer_momentum": {"what": "outer_momentum"},
    "basis": {"what": "basis", "power": 1},
    "again and again": {"what": "weight", "every": 3, "steps": 30, "max_left_out_syncs": 3},
}


@pytest.mark.distributed
@pytest.mark.parametrize("replicas", [2, 3])
def test_a_flipped_exponent_bit_stays_out_of_the_average_and_is_named_and_counted(replicas: int) -> None:
    ranks = run_ranks(hits, replicas, CASES, timeout_s=120)
    honest = ranks[0]["honest"]["weights"]
    assert ranks[0]["honest"]["participants"] == [replicas] * 3 and not any(ranks[0]["honest"]["left_out"])
    for found in ranks:
        for case in ("weight", "exp_avg", "exp_avg_sq", "row_mean_sq", "anchor"):
            one = found[case]
            assert not one["error"], case
            assert one["participants"] == [replicas, replicas - 1, replicas], case
            assert one["as_outlier"] == one["left_out"] == [int(m == 1) for m in range(replicas)], case
            assert list(one["outliers"]) == [6] and "times that of the others" in one["outliers"][6][1], case
            assert float(one["weights"].abs().max()) < 10.0, case
            assert torch.equal(one["weights"], ranks[0][case]["weights"]), case
            assert torch.equal(one["anchor"], ranks[0][case]["anchor"]), case
        # Without the rule, one bit is in everybody's weights.
        spoiled = found["weight, not looked for"]
        assert spoiled["participants"] == [replicas] * 3 and float((spoiled["weights"] - honest).abs().max()) > 1e5
        # What the rule cannot see must be equal anyway, and ends the run by its name.
        for case, when in (("anchor a little", "after"), ("outer_momentum", "after"), ("basis", "before")):
            assert f"{HIT} on replicas [1]" in found[case]["error"] and when in found[case]["error"], case
        last = found["again and again"]
        assert "replica 1 was far from the others at 3 syncs in a row, the last at step 12" in last["error"]


# -- the rule ----------------------------------------------------------------------------------------


def judged(*first_sizes: float, executed: list[int] | None = None, before: float = 0.0) -> list[int]:
    """The outliers among replicas with these |D_m|, at a limit of 10."""
    sizes = [[size] + [1.0] * (len(SIZES) - 1) for size in first_sizes]
    replicas = len(sizes)
    last = [[before] * len(SIZES)] * replicas
    return list(far_from_others(sizes, [True] * replicas, executed or [5] * replicas, last, 10.0))


def test_the_measure_is_the_median_of_the_others() -> None:
    assert judged(1.0, 2.0, 1e3) == [2]
    assert judged(1.0, 2.0, 1e3, 1e3, 1.0) == [2, 3]
    assert judged(1.0, 2.0, 9.0) == []
    assert judged(1.0, 2.0, math.inf) == [2]


def test_nobody_is_held_against_a_replica_that_executed_less() -> None:
    """A warm-up of the learning rate makes any ratio between them."""
    assert judged(0.0, 1e-9, 1.0, executed=[4, 4, 5]) == []
    assert judged(1.0, 1.0, 1e3, executed=[5, 5, 4]) == [2]
    assert judged(0.0, 0.0, 1.0) == []  # they skipped all of them


def test_of_two_replicas_the_larger_one_must_also_have_grown() -> None:
    assert judged(1.0, 1e3) == [1]
    assert judged(1.0, 1e3, before=2.0) == [1]
    assert judged(1.0, 1e3, before=500.0) == []
    assert judged(1e3, 1e3, before=1.0) == []


# -- replicas of several ranks -----------------------------------------------------------------------


def hit_engines() -> dict[str, Any]:
    """Two replicas of two ranks; one rank of replica 1 is hit: a shard, or at stage 0 a copy."""
    import lordo_ds
    from tests import engines

    logging.getLogger("lordo_ds").setLevel(logging.CRITICAL)
    found = {}
    for stage in (0, 2, 3):
        config = engines.settings(optimizer={"replica_size": 2}, zero_optimization={"stage": stage})
        engine = engines.make_engine(config)
        sync = lordo_ds.hook(engine).optimizer.sync  # type: ignore[union-attr]
        for step in range(1, 10):
            engines.train_step(engine, step)
            if step == 4 and dist.get_rank() == 3:
                flip_(next(item for item in sync.items if item.numel).weight, 32)
        status = lordo_ds.status(engine)
        weights = engines.weights(engine)
        found[f"stage {stage}"] = {
            "as_outlier": status["syncs_as_outlier_by_replica"],
            "left_out": status["syncs_left_out_by_replica"],
            "participants": status["last_sync"]["participants"],
            "weights": torch.cat([weight.flatten() for weight in weights.values()]),
        }
        engine.destroy()
    return found


@pytest.mark.distributed
@pytest.mark.deepspeed
def test_all_ranks_of_a_replica_agree_that_one_of_them_was_hit() -> None:
    ranks = run_ranks(hit_engines, 4, timeout_s=120)
    for found in ranks:
        for stage, one in found.items():
            assert one["as_outlier"] == one["left_out"] == [0, 1] and one["participants"] == 2, stage
            assert torch.equal(one["weights"], ranks[0][stage]["weights"]), stage
            assert float(one["weights"].abs().max()) < 10.0, stage


def test_sizes_are_taken_without_a_copy_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from lordo_ds.sync import outliers

    class Largest(TorchDispatchMode):
        """The largest tensor that any operation made."""

        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, (list, tuple)) else [out]
            new = [one for one in made if one.untyped_storage().data_ptr() not in held]  # no views
            self.numel = max([self.numel, *(one.numel() for one in new)])
            return out

    weight = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = LoRDO([("a.weight", weight)], rank=4, outer={"momentum": 0.5})
    optimizer._attach_alone()
    assert optimizer.sync is not None
    monkeypatch.setattr(outliers, "_CHUNK_NUMEL", 100)
    weight.data[3, 5] += 7.0
    kept = [weight, *(t for t in optimizer.state[weight]["a.weight"].values() if isinstance(t, Tensor))]
    held = {tensor.untyped_storage().data_ptr() for tensor in kept}
    with Largest() as largest:
        sizes = outliers.sizes_of(optimizer.sync.items, with_pseudo_gradient=True)
    assert sizes[:2] == pytest.approx([49.0, 7.0], rel=1e-5) and 0 < largest.numel <= 100


# -- a NaN that somebody writes between two steps ----------------------------------------------------


def spoilt_between_steps(everywhere: bool, loads_too: bool) -> tuple[dict[str, Tensor], list[int], bool]:
    """A NaN in one weight before step 5, and perhaps a load of another one; syncs at steps 3, 6 and 9."""
    logging.getLogger("lordo_ds").setLevel(logging.ERROR)
    weights = {name: nn.Parameter(torch.full((6, 4), 0.5)) for name in ("hit", "other")}
    optimizer = LoRDO(weights.items(), lr=1e-2, rank=2, sync_interval=3, preset="recommended")
    for step in range(1, 10):
        if step == 5 and (everywhere or dist.get_rank() == 1):
            with torch.no_grad():
                weights["hit"][1, 2] = float("nan")
                if loads_too:
                    weights["other"].mul_(3.0)
        for index, weight in enumerate(weights.values()):
            seed = 100 * step + 10 * index + dist.get_rank()
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    assert optimizer.sync is not None
    report = optimizer.sync.last_report
    return {n: w.detach() for n, w in weights.items()}, list(optimizer.sync.faults.left_out), bool(report)


@pytest.mark.parametrize("loads_too", [False, True])
def test_a_nan_that_is_written_between_two_steps_is_no_load_and_does_not_spoil_the_anchor(loads_too: bool) -> None:
    """It was taken for loaded weights: the anchor became NaN, and the reseeded replica differed from the others."""
    found = run_ranks(spoilt_between_steps, 2, False, loads_too)
    for weights, left_out, _ in found:
        assert left_out == [0, 1]
        assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())
        assert all(torch.equal(weight, found[0][0][name]) for name, weight in weights.items())


def test_where_all_replicas_are_given_a_nan_they_go_back_to_an_anchor_without_it() -> None:
    for weights, left_out, _ in run_ranks(spoilt_between_steps, 2, True, False):
        assert left_out == [1, 1]
        assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())
