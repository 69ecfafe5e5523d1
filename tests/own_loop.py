"""Megatron's own training loop for tests, on the CPU: its schedules, DistributedDataParallel and optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests import problems

SETTINGS: dict[str, Any] = {"rank": 3, "sync_interval": 3, "outer": {"lr": 0.7, "momentum": 0.7}}
LR, EPS, DECAY, CLIP = 1e-2, 1e-2, 0.1, 1.5
Gradients = dict[str, Tensor]


class Weights(nn.Module):
    """The weights of tests/problems.py; its loss has the gradients that it is given."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        from megatron.core.enums import ModelType

        super().__init__()
        self.config, self.model_type = config, ModelType.encoder_or_decoder
        for name, weight in problems.initial_weights(torch.float32).items():
            self.register_parameter(name, nn.Parameter(weight.to(dtype)))

    def set_input_tensor(self, tensors: Any) -> None:
        """What a pipeline stage is given; there is one stage here."""

    def forward(self, gradients: Gradients) -> Tensor:
        return sum((getattr(self, name).float() * g).sum() for name, g in gradients.items())  # type: ignore[return-value]


def toy_config(**more: Any) -> Any:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **more)
    config.finalize_model_grads_func = finalize_model_grads
    return config


def optimizer_config(dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    precision = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    return OptimizerConfig(**{"lr": LR, "adam_eps": EPS, "weight_decay": DECAY, "clip_grad": CLIP, **precision, **more})


class Loop:
    """A model in replicas, its optimizer, and Megatron's schedule that drives them."""

    def __init__(self, module: nn.Module, mine: Any, chunk: nn.Module, optimizer: Any) -> None:
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        self.module, self.mine, self.chunk, self.optimizer = module, mine, chunk, optimizer
        self.run_schedule = get_forward_backward_func()

    @classmethod
    def of_toys(cls, replica_size: int = 1, dtype: torch.dtype = torch.float32, **more: Any) -> Loop:
        config = toy_config(bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, **more.pop("model", {}))
        return cls.of(Weights(config, dtype), config, replica_size, dtype, **more)

    @classmethod
    def of(
        cls, module: nn.Module, config: Any, replica_size: int, dtype: torch.dtype, overlap: bool = False, **more: Any
    ) -> Loop:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        from megatron_patches.ddp import replicas
        from megatron_patches.optimizer import lordo_optimizer

        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, bucket_size=100 if overlap else None
        )
        with replicas(replica_size) as mine:
            chunk = DistributedDataParallel(config, ddp_config, module)
        settings = {**SETTINGS, **more.pop("settings", {})}
        # Without overrides weight decay is for all parameters, as in the reference.
        overrides = more.pop("overrides", {})
        optimizer = lordo_optimizer([chunk], settings, optimizer_config(dtype, **more), mine, overrides)
        config.grad_scale_func, config.no_sync_func = optimizer.scale_loss, chunk.no_sync
        return cls(module, mine, chunk, optimizer)

    def step(self, batches: list[Any], forward_step: Any, seq_length: int = 1, micro_batch_size: int = 1) -> Any:
        """One step on these micro-batches; what Megatron's optimizer said, and the losses on the last stage."""
        losses = self.run(
            iter(batches), forward_step, len(batches), seq_length=seq_length, micro_batch_size=micro_batch_size
        )
        return self.optimizer.step(), losses

    def run(self, batches: Iterator[Any], forward_step: Any, count: int, **more: Any) -> Any:
        """Megatron's schedule over that many micro-batches: forward, backward, gradients finalized."""
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self.run_schedule(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[self.chunk],
            num_microbatches=count,
            **{"seq_length": 1, "micro_batch_size": 1, **more},
        )

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}


def forward_toy(batches: Iterator[Gradients], model: nn.Module) -> Any:
    return model(next(batches)), lambda loss: (loss, {"loss": loss.detach()})
