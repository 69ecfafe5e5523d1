"""DeepSpeed engines over problems whose gradients are known numbers."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

import lordo_ds
from tests import problems

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LORDO = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "rank": 3, "sync_interval": 3}


class GivenGradients(nn.Module):
    """Parameters of `tests.problems`; the loss is <W, G>, so the gradient is the G it is called with."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        for name, weight in problems.initial_weights(torch.float32).items():
            self.register_parameter(name, nn.Parameter(weight * scale))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum((p.float() * gradients[name].float()).sum() for name, p in self.named_parameters())  # type: ignore[return-value]


def settings(dtype: str = "fp32", optimizer: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """A DeepSpeed configuration with LoRDO; `optimizer` overrides keys of its params."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "LoRDO", "params": {**LORDO, **(optimizer or {})}},
        "steps_per_print": 10**9,
        **keys,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True, **({"loss_scale": 16.0} if dtype == "fp16" else {})}
    return config


def skip_where_fp16_is_refused(config: dict[str, Any]) -> None:
    """Skips the test, or the case of it, whose configuration DeepSpeed refuses on this machine, on every rank alike.

    `ONEDNN_MAX_CPU_ISA=AVX2` makes any x86 processor such a machine.
    """
    if config.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        why = "oneDNN has no fp16 on this CPU" if get_accelerator().device_name() == "cpu" else "the device has none"
        pytest.skip(f"DeepSpeed refuses fp16 here: {why}")


def make_engine(config: dict[str, Any], model: nn.Module | None = None, **given: Any) -> Any:
    """A DeepSpeed engine over `GivenGradients` (or the given model); skips where the machine cannot train it."""
    skip_where_fp16_is_refused(config)
    return deepspeed.initialize(model=model or GivenGradients(), config=config, **given)[0]


def load_in_this_process() -> None:
    """On a rank: DeepSpeed's loaders start no worker processes, two per rank."""
    from deepspeed.runtime import engine as engine_module

    class InThisProcess(engine_module.DeepSpeedDataLoader):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "num_local_io_workers": 0})

    engine_module.DeepSpeedDataLoader = InThisProcess


def train_step(engine: Any, step: int, dp_rank: int | None = None, spoil: float | None = None) -> float:
    """One step on the gradients of (step, replica); `spoil` multiplies them (inf and nan break the step)."""
    gradients = problems.gradients(step, dist.get_rank() if dp_rank is None else dp_rank, torch.float32)
    if spoil is not None:
        gradients = {name: gradient * spoil for name, gradient in gradients.items()}
    loss = engine(gradients)
    engine.backward(loss)
    engine.step()
    return float(loss)


def weights(engine: Any) -> dict[str, Tensor]:
    """Copies of what the optimizer steps, whole: the full-precision weights."""
    sync = lordo_ds.hook(engine).optimizer.sync  # type: ignore[union-attr]
    found = {}
    for item in sync.items:
        whole = item.weight.new_zeros(item.plan.numel)
        start, stop = item.intervals[sync.inside.shard.index]
        whole[start:stop] = item.weight
        found[item.plan.name] = sync.inside.shard.sum_(whole, "test").view(item.plan.shape)
    return found
