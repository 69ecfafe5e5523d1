"""What DeepSpeed's own tests do to an engine, and brought to light: launchers/deepspeed_own_tests.py runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

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
