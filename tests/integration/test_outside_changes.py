"""Weights that a user loads, swaps or replaces after `deepspeed.initialize` are trained, or refused; never lost."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lordo_ds
from lordo_ds import ConfigError, LoRDO
from lordo_ds.errors import SyncError
from tests import problems
from tests.engines import GivenGradients, make_engine, settings, train_step, weights
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

PRESET = {"preset": "recommended", "weight_decay": 0.0, "lr": 1e-3}
ENGINES = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
ENGINES += [(1, "bf16 in fp32")]  # what accumulates gradients in fp32: BF16_Optimizer


def engine_of(stage: int, dtype: str, replica_size: int = 1, model: nn.Module | None = None, **more: Any) -> Any:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 30  # some are partitioned, some kept whole
    keys: dict[str, Any] = {"zero_optimization": zero}
    if dtype == "bf16 in fp32":
        dtype, keys["data_types"] = "bf16", {"grad_accum_dtype": "fp32"}
    return make_engine(settings(dtype, {**PRESET, "replica_size": replica_size, **more}, **keys), model)


def other_weights() -> dict[str, Tensor]:
    """Far from `problems.initial_weights`, and as exact in bf16."""
    return {name: -2.0 * w.flip(0) for name, w in problems.initial_weights(torch.float32).items()}


def load(engine: Any, state: dict[str, Tensor]) -> None:
    parameters = dict(engine.module.named_parameters())
    if engine.zero_optimization_stage() < 3:
        engine.module.load_state_dict(state)
        return
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0):
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def model_weights(engine: Any) -> dict[str, Tensor]:
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_optimization_stage() == 3):
        return {name: parameter.detach().float().clone() for name, parameter in parameters.items()}


def train(engine: Any, first: int, last: int, replica_size: int = 1) -> None:
    for step in range(first, last + 1):
        train_step(engine, step, dist.get_rank() // replica_size)


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest of all parameters', relative to its norm."""
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def built_from(stage: int, dtype: str, replica_size: int) -> dict[str, Tensor]:
    """The trajectory that a load before the first step must give."""
    model = GivenGradients()
    model.load_state_dict(other_weights())
    engine = engine_of(stage, dtype, replica_size, model)
    train(engine, 1, 7, replica_size)
    found = weights(engine)
    engine.destroy()
    return found


def loaded(replica_size: int) -> dict[tuple[int, str], dict[str, Any]]:
    found = {}
    for stage, dtype in ENGINES if replica_size > 1 else ENGINES[::3]:
        engine = engine_of(stage, dtype, replica_size)
        load(engine, other_weights())
        train(engine, 1, 7, replica_size)
        one: dict[str, Any] = {"before": distance(weights(engine), built_from(stage, dtype, replica_size))}
        # Between syncs, and with training that the load undoes.
        state = problems.initial_weights(torch.float32)
        load(engine, state)
        train(engine, 8, 9, replica_size)
        assert lordo_ds.hook(engine).synced  # type: ignore[union-attr]
        one["later"] = distance(weights(engine), state)
        one["model"] = distance(model_weights(engine), weights(engine))
        found[stage, dtype] = one
        engine.destroy()
    return found


@pytest.mark.parametrize("replica_size", [1, 2])
def test_weights_loaded_after_initialize_are_those_that_are_trained(replica_size: int) -> None:
    for found in run_ranks(loaded, 2 * replica_size, replica_size, timeout_s=240):
        for (stage, dtype), one in found.items():
            assert one["before"] == 0.0, f"stage {stage} {dtype}: {one['before']}"
            assert one["later"] < 0.1, f"stage {stage} {dtype}: {one['later']}"  # 2.96 with the old anchor
            assert one["model"] < 0.01, f"stage {stage} {dtype}: {one['model']}"


def swapped() -> dict[tuple[int, str], bool]:
    """Other weights for an evaluation, and back."""
    found = {}
    for stage, dtype in [(0, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")]:
        ends = []
        for swaps in (False, True):
            engine = engine_of(stage, dtype)
            for step in range(1, 8):
                train(engine, step, step)
                if swaps:
                    kept = model_weights(engine)
                    load(engine, other_weights())
                    load(engine, kept)
            ends.append(weights(engine))
            engine.destroy()
        found[stage, dtype] = all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    return found


def test_weights_that_are_swapped_in_and_back_again_change_nothing() -> None:
    for found in run_ranks(swapped, 2, timeout_s=120):
        assert all(found.values()), found


def saved_at_once(folder: str) -> float:
    """Weights loaded into the model, no checkpoint to go on from, and a first save before the first step."""
    engine = engine_of(0, "fp32")
    load(engine, other_weights())
    assert engine.load_checkpoint(folder)[0] is None
    engine.save_checkpoint(folder, tag="start")
    engine.destroy()
    again = engine_of(0, "fp32")
    again.load_checkpoint(folder, tag="start")
    train(again, 1, 3)
    found = distance(weights(again), other_weights())
    again.destroy()
    return found


def test_weights_loaded_before_a_first_save_are_those_that_a_resumed_run_trains(tmp_path: Path) -> None:
    assert all(apart < 0.1 for apart in run_ranks(saved_at_once, 2, str(tmp_path), timeout_s=60))


def refused() -> dict[str, str]:
    logging.getLogger("lordo_ds").setLevel(logging.ERROR)
    found = {}

    def message(what: str, stage: int, dtype: str, change: Any, steps: int = 4) -> None:
        engine = engine_of(stage, dtype)
        try:
            change(engine)
            train(engine, 1, steps)
            found[what] = ""
        except (ConfigError, SyncError) as error:
            found[what] = f"{type(error).__name__}: {error}"
        engine.destroy()

    def on_rank_0(engine: Any) -> None:
        if dist.get_rank() == 0:
            load(engine, other_weights())

    def another_object(engine: Any) -> None:
        engine.module.wide = nn.Parameter(engine.module.wide.detach().clone())

    def another_shape(engine: Any) -> None:
        engine.module.wide.data = torch.zeros(5, 1, dtype=engine.module.wide.dtype)  # the loss broadcasts

    def other_storage(engine: Any) -> None:
        engine.module.wide.data = engine.module.wide.data.clone()

    for stage, dtype in ((0, "fp32"), (1, "bf16")):
        message(f"rank 0 {dtype}", stage, dtype, on_rank_0)
        message(f"object {dtype}", stage, dtype, another_object)
    for stage, dtype in ((0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16")):
        message(f"shape {stage} {dtype}", stage, dtype, another_shape)
    message("storage fp32", 0, "fp32", other_storage)
    message("storage bf16", 1, "bf16", other_storage)
    return found


def test_what_cannot_be_trained_is_refused_by_name() -> None:
    for found in run_ranks(refused, 2, timeout_s=120):
        for dtype in ("fp32", "bf16"):
            assert "SyncError" in found[f"rank 0 {dtype}"] and "on replicas [0]" in found[f"rank 0 {dtype}"]
            assert "ConfigError: LoRDO: wide was replaced" in found[f"object {dtype}"]
        shapes = [one for what, one in found.items() if what.startswith("shape")]
        assert len(shapes) == 4 and all(
            "ConfigError: LoRDO: wide was resized from (5, 16) to (5, 1)" in s for s in shapes
        )
        assert found["storage fp32"] == "" and "wide was given other storage" in found["storage bf16"]


# -- without an engine -------------------------------------------------------------------------------


def alone(change: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    named = {name: nn.Parameter(w) for name, w in problems.initial_weights(torch.float32).items()}
    optimizer = LoRDO(named.items(), **{**PRESET, "rank": 3, "eps": 1e-2, "sync_interval": 3})
    sent = []
    for step in range(1, 7):
        if change == "load" and step == 6:
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(other_weights()[name])
        elif change == "data" and step == 6:
            for name, parameter in named.items():
                parameter.data = other_weights()[name]
        elif change == "normalise":  # a rule of the user's own, after every step
            with torch.no_grad():
                for parameter in named.values():
                    parameter.mul_(1 - 1e-3)
        for name, gradient in problems.gradients(step, dist.get_rank(), torch.float32).items():
            named[name].grad = gradient
        assert optimizer.sync is None or not sent or optimizer.sync.wire.ledger.total_bytes == sent[-1]
        optimizer.step()
        assert optimizer.sync is not None
        sent.append(optimizer.sync.wire.ledger.total_bytes)
    report = optimizer.last_report
    assert report is not None
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in named.items()},
        "report": (report.step, report.bytes_sent, optimizer.sync.predicted_bytes(_plan(optimizer), 0, 0)),
    }


def _plan(optimizer: LoRDO) -> Any:
    from lordo_ds.core.schedule import sync_plan

    return sync_plan(optimizer.config, optimizer.attempted_steps)


@pytest.mark.parametrize("change", ["load", "data"])
def test_alone_weights_loaded_between_syncs_are_kept(change: str) -> None:
    for found in run_ranks(alone, 2, change, timeout_s=60):
        assert distance(found["weights"], other_weights()) < 0.1
        assert found["report"][1] == found["report"][2]


def test_small_changes_after_every_step_count_as_training() -> None:
    found = run_ranks(alone, 2, "normalise", timeout_s=60)
    assert all(torch.equal(found[0]["weights"][name], w) for name, w in found[1]["weights"].items())
