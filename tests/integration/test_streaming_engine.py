"""Streaming through DeepSpeed: every ZeRO stage follows `reference.py`, overflows and saves included."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lordo_ds
from lordo_ds import LordoConfig
from lordo_ds.comm.groups import of_all_ranks
from lordo_ds.core.grouping import plan_parameters
from lordo_ds.core.reference import Reference
from lordo_ds.errors import CheckpointError
from tests import problems
from tests.cases import Found, once, run_cases
from tests.engines import LORDO, make_engine, settings, train_step
from tests.integration.test_zero_trajectories import fragments_of, low_precision_digest, zero

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]

STEPS = 11
REPLICAS, SHARDS = 2, 2
MODES: dict[str, dict[str, Any]] = {
    "paper": {"sync_interval": 6, "streaming": {"fragments": 2, "delay_steps": 2}},
    "factored": {
        "sync_interval": 4,
        "streaming": {"fragments": 3, "delay_steps": 1},
        "qh_mode": "factored",
        "outer": {"lr": 0.7, "momentum": 0.7},
    },
    "one fragment": {"sync_interval": 4, "streaming": {"delay_steps": 3}, "average_dense_moments": True},
    "at once": {"sync_interval": 4, "streaming": {"fragments": 3}, "error_feedback": "fp32"},
}


def reference_of(mode: str) -> Reference:
    config = LordoConfig.parse({**LORDO, **MODES[mode]})
    start = [problems.initial_weights(torch.float32) for _ in range(REPLICAS)]
    return Reference(config, plan_parameters(config, problems.facts()), start)


def mean_gradients(step: int, replica: int) -> dict[str, torch.Tensor]:
    """Of a replica: the mean over its ranks."""
    each = [problems.gradients(step, replica * SHARDS + shard, torch.float32) for shard in range(SHARDS)]
    return {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}


def ladder(mode: str, stage: int, dtype: str, spoilt: tuple[int, ...]) -> dict[str, Any]:
    """The largest distance from the reference, relative to a parameter's largest weight.

    Args:
        spoilt: steps at which a rank of replica 1 overflows (fp16), or has a loss that is not finite.
    """
    torch.set_num_threads(1)
    replica = dist.get_rank() // SHARDS
    engine = make_engine(settings(dtype, {**MODES[mode], "replica_size": SHARDS}, **zero(stage)))
    reference, worst, stale, landed = reference_of(mode), 0.0, 0.0, []
    for step in range(1, STEPS + 1):
        bad, overflows = step in spoilt, step in spoilt and dtype == "fp16"
        last = dist.get_rank() == REPLICAS * SHARDS - 1
        train_step(engine, step, spoil=math.inf if overflows and last else None)
        lordo_ds.hook(engine).record(loss=math.nan if bad and last and not overflows else 1.0)
        gradients = [None if m and overflows else mean_gradients(step, m) for m in range(REPLICAS)]
        reference.step(gradients, losses=[1.0, math.nan if bad else 1.0])
        masters = fragments_of(engine)
        for name, (at, found) in masters.items():
            whole = reference.weights[replica][name].flatten()
            off = (found - whole[at : at + found.numel()]).abs()
            worst = max(worst, float(off.max() / whole.abs().max()) if found.numel() else 0.0)
        # What the next forward pass computes with is what was stepped, rounded.
        used, own = low_precision_digest(engine), 0.0
        for _, found in masters.values():
            at_rank = found.to(next(engine.module.parameters()).dtype).double().sum()
            own += float(lordo_ds.hook(engine).optimizer.sync.inside.shard.sum_(at_rank.reshape(1), "test"))
        stale = max(stale, abs(own - sum(used)))
        if lordo_ds.hook(engine).synced:
            landed.append(step)
    status = lordo_ds.status(engine)
    return {
        "left_out": status["syncs_left_out_by_replica"],
        "worst": worst,
        "stale": stale,
        "landed": landed,
        "executed": status["executed_steps"] - reference.executed[replica],
    }


CASES: dict[str, tuple[Any, ...]] = {
    **{f"{mode} {stage}": (mode, stage, "fp32", ()) for mode in ("paper", "factored") for stage in range(4)},
    **{f"{mode} {stage}": (mode, stage, "fp32", ()) for mode in ("one fragment", "at once") for stage in (1, 3)},
    **{f"{dtype} {stage}": ("paper", stage, dtype, ()) for dtype in ("bf16",) for stage in range(4)},
    **{f"fp16 {stage}": ("paper", stage, "fp16", (2, 4, 6)) for stage in (0, 1, 3)},
    # Left out of the fragment that begins at step 6, and replaced in both where that lands.
    **{f"not finite {stage}": ("paper", stage, "fp32", (5,)) for stage in range(4)},
}


@once
def ladders() -> Found[str]:
    return run_cases(ladder, REPLICAS * SHARDS, CASES, timeout_s=240)


@pytest.mark.parametrize("case", CASES)
def test_every_zero_stage_follows_the_reference(case: str) -> None:
    mode, _, dtype, _ = CASES[case]
    delay, fragments = (
        MODES[mode]["streaming"].get(key, least) for key, least in (("delay_steps", 0), ("fragments", 1))
    )
    interval = MODES[mode]["sync_interval"]
    due = {start + (f + 1) * interval // fragments for start in range(0, STEPS, interval) for f in range(fragments)}
    for found in ladders()[case]:
        assert found["worst"] < (1e-5 if dtype == "fp32" else 4e-3), found
        assert found["stale"] < 1e-4 and found["executed"] == 0, found
        assert found["left_out"] == [0, int(case.startswith("not finite"))]
        assert found["landed"] == sorted(step + delay for step in due if step + delay <= STEPS)


# -- saves -------------------------------------------------------------------------------------------


def saved_in_flight(stage: int, folder: str) -> dict[str, Any]:
    """Saved at step 7, when the second fragment, begun at 6, is in flight; resumed in another engine."""
    torch.set_num_threads(1)
    config = settings("fp32", {**MODES["paper"], "replica_size": SHARDS}, **zero(stage))
    engine = make_engine(config)
    for step in range(1, 8):
        train_step(engine, step)
        lordo_ds.hook(engine).record(loss=float(step))
    flight = lordo_ds.status(engine)["fragment_in_flight"]
    engine.save_checkpoint(folder, "t")
    drained = lordo_ds.status(engine)["fragment_in_flight"], lordo_ds.hook(engine).synced
    rows = len(lordo_ds.hook(engine).averaged_rows())
    again = make_engine(config)
    for step in range(1, 5):  # in flight: the first fragment, begun at 3
        train_step(again, step)
    again.load_checkpoint(folder, "t")
    equal = []
    for step in range(8, 15):
        train_step(engine, step)
        train_step(again, step)
        pairs = zip(fragments_of(engine).values(), fragments_of(again).values(), strict=True)
        equal.append(all(torch.equal(one, other) for (_, one), (_, other) in pairs))
    engine.save_checkpoint(folder, "later")
    again.destroy()
    engine.destroy()
    return {"flight": flight, "drained": drained, "rows": rows, "equal": equal}


def saved_with_other_weights(folder: str) -> str:
    """Weights are swapped in for an evaluation on one rank only, and the save comes then: refused on all."""
    engine = make_engine(settings("fp32", MODES["paper"], **zero(0)))
    for step in range(1, 5):
        train_step(engine, step)
    if dist.get_rank() == 0:
        with torch.no_grad():
            engine.module.tall.mul_(2.0)
    try:
        engine.save_checkpoint(folder, "t")
    except CheckpointError as error:
        return str(error)
    return ""


def in_folder(function: Any, *args: Any) -> Any:
    folder = of_all_ranks(tempfile.mkdtemp() if dist.get_rank() == 0 else "")[0]
    return function(*args, folder), len(list(Path(folder).iterdir()))


@once
def saves() -> Found[Any]:
    cases: dict[Any, tuple[Any, ...]] = {stage: (saved_in_flight, stage) for stage in (0, 1, 3)}
    return run_cases(in_folder, REPLICAS * SHARDS, {**cases, "swapped": (saved_with_other_weights,)}, timeout_s=120)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_save_drains_first_and_resuming_is_bitwise_the_run_that_saved(stage: int) -> None:
    for found, _ in saves()[stage]:
        assert found["flight"] == 1 and found["drained"] == (None, True)
        assert found["rows"] == 5  # those of steps 1 to 5: the sync began at the end of step 6, before its row came
        assert found["equal"] == [True] * 7


def test_a_save_does_not_drain_into_weights_that_were_swapped_in() -> None:
    assert all("put them back first" in message and not files for message, files in saves()["swapped"])
