"""What DeepSpeed's own tests do to an engine, and brought to light: launchers/deepspeed_own_tests.py runs them."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from lordo_ds import ConfigError, LoRDO
from lordo_ds.adapters.patching import PatchError
from tests.engines import GivenGradients, make_engine, settings, train_step
from tests.ranks import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]


class _Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2,), float(index))


def _wrapped(name: str, calls: list[str]) -> Any:
    """What users and tracers do to a class without functools.wraps: the parameters are hidden."""
    original = getattr(DeepSpeedEngine, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    setattr(DeepSpeedEngine, name, wrapper)
    return original


def train_with_wrapped_methods() -> tuple[list[str], int, str]:
    calls: list[str] = []
    originals = {name: _wrapped(name, calls) for name in ("deepspeed_io", "_take_model_step")}
    try:
        engine = make_engine(settings(), training_data=_Rows())
        train_step(engine, 1)
        batches = len(engine.training_dataloader)
        engine.destroy()
        originals["save_checkpoint"] = _wrapped("save_checkpoint", calls)
        with pytest.raises(PatchError) as refused:
            make_engine(settings(), GivenGradients())
    finally:
        for name, original in originals.items():
            setattr(DeepSpeedEngine, name, original)
    return calls, batches, str(refused.value)


def test_methods_that_somebody_wrapped_without_their_parameters_still_work_or_are_named() -> None:
    for calls, batches, refusal in run_ranks(train_with_wrapped_methods, 2):
        assert calls == ["deepspeed_io", "_take_model_step"]
        assert batches == 4
        assert refusal.startswith("LoRDO: DeepSpeedEngine.save_checkpoint was replaced in this process by tests.")
        assert "functools.wraps" in refusal


# -- one parameter's weight, gradient and state ------------------------------------------------------

ENGINES: list[dict[str, Any]] = [
    {"zero_optimization": {"stage": 1}},
    {"zero_optimization": {"stage": 2}},
    {"zero_optimization": {"stage": 3}},
    {"dtype": "bf16", "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
]


def access_one_parameter() -> list[dict[str, Any]]:
    """On one replica of all ranks: most parameters lie on one rank only."""
    found = []
    for keys in ENGINES:
        keys = dict(keys)
        engine = make_engine(settings(keys.pop("dtype", "fp32"), {"replica_size": "all"}, **keys))
        train_step(engine, 1)
        said = {}
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}
        for name, parameter in engine.module.named_parameters():
            try:
                safe_get_full_optimizer_state(parameter, "exp_avg")
            except ValueError as error:
                said[f"get {name}"] = str(error)
            try:
                safe_set_full_optimizer_state(parameter, torch.zeros(shapes[name]), "exp_avg_sq")
            except ValueError as error:
                said[f"set {name}"] = str(error)
        weight = engine.module.square
        before = safe_get_full_fp32_param(weight)
        safe_set_full_fp32_param(weight, before + 1)
        moved = float((safe_get_full_fp32_param(weight) - before - 1).abs().max())
        loss = engine({name: torch.ones(shape) for name, shape in shapes.items()})
        engine.backward(loss)
        gradient = safe_get_full_grad(weight)
        found.append({"said": said, "moved": moved, "gradient": float((gradient.float() - 1).abs().max())})
        engine.destroy()
    return found


def test_a_state_of_one_parameter_is_refused_on_every_rank_and_its_weight_and_gradient_are_there() -> None:
    for rank in run_ranks(access_one_parameter, 2, timeout_s=60):
        for engine in rank:
            assert len(engine["said"]) == 12
            assert all("use safe_get_full_fp32_param for weights" in text for text in engine["said"].values())
            assert {text.split(" of ")[0] for text in engine["said"].values()} == {
                "LoRDO: there is no 'exp_avg'",
                "LoRDO: there is no 'exp_avg_sq'",
            }
            assert engine["moved"] < 1e-6 and engine["gradient"] == 0.0


# -- two optimizers ----------------------------------------------------------------------------------


def asked_for_two_optimizers() -> list[str]:
    model, block, said = GivenGradients(), {"type": "SGD", "params": {"lr": 0.1}}, []
    for keys, optimizer in (
        # DeepSpeed lets the one given here win; ZeRO-3 cut the parameters by the replicas of the one in the JSON.
        (
            {"zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True},
            torch.optim.SGD(model.parameters(), lr=0.1),
        ),
        ({}, lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
        # It averaged the gradients of all ranks, and LoRDO took each of them for a replica.
        ({"optimizer": block}, lambda parameters: LoRDO(parameters, rank=3)),
    ):
        with pytest.raises(ConfigError) as refused:
            make_engine({**settings(), **keys}, model, optimizer=optimizer)
        said.append(str(refused.value))
    return said


def test_two_optimizers_or_a_function_that_makes_ours_are_refused() -> None:
    for other, made, hidden in run_ranks(asked_for_two_optimizers, 2):
        assert other.startswith("LoRDO: the configuration asks for LoRDO, and deepspeed.initialize was given SGD")
        assert made.startswith("LoRDO: the configuration asks for LoRDO, and deepspeed.initialize was given a function")
        assert hidden.startswith("LoRDO: deepspeed.initialize was given a function that makes LoRDO")


def partitioned_for_another_stage() -> str:
    with deepspeed.zero.Init(config_dict_or_path=settings(optimizer={"replica_size": "all"})):
        model = torch.nn.Linear(4, 4)
    with pytest.raises(ConfigError) as refused:
        make_engine(settings(optimizer={"replica_size": "all"}), model)
    return str(refused.value)


def test_a_model_of_zero_init_below_stage_3_is_refused_in_its_own_words() -> None:
    for message in run_ranks(partitioned_for_another_stage, 2):
        assert message.startswith("LoRDO: deepspeed.zero.Init partitioned weight, but zero_optimization.stage is 0")
