"""What LoRDO cannot do in Megatron's own loop, refused before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.utils import get_model_config

from lordo_ds.errors import ConfigError


def check_support(model_chunks: Sequence[Any], config: OptimizerConfig) -> None:
    """Refuse what is not supported, in one line that says what to do.

    Raises:
        ConfigError: the first thing found.
    """
    for is_so, what in _unsupported(model_chunks, config):
        if is_so:
            raise ConfigError(f"LoRDO: {what}")


def _unsupported(chunks: Sequence[Any], config: OptimizerConfig) -> Iterator[tuple[bool, str]]:
    yield (
        len(chunks) != 1,
        f"{len(chunks)} model chunks (virtual pipeline stages) are not supported: use one per rank",
    )
    ddp, model = getattr(chunks[0], "ddp_config", None), get_model_config(chunks[0])
    yield (
        config.use_distributed_optimizer or getattr(ddp, "use_distributed_optimizer", False),
        "the distributed optimizer is not supported: set use_distributed_optimizer to False in OptimizerConfig and "
        "DistributedDataParallelConfig (LoRDO's own state is small)",
    )
    yield (
        getattr(ddp, "use_megatron_fsdp", False) or getattr(ddp, "use_custom_fsdp", False),
        "Megatron's FSDP is not supported: set use_megatron_fsdp to False",
    )
    for name in (
        "optimizer_cpu_offload",
        "use_precision_aware_optimizer",
        "overlap_param_gather",
        "overlap_param_gather_with_optimizer_step",
    ):
        yield bool(getattr(config, name, False)), f"{name} is not supported: set it to False in OptimizerConfig"
    yield (
        not config.decoupled_weight_decay,
        "weight decay is decoupled, as in AdamW: set decoupled_weight_decay to True",
    )
    yield (
        parallel_state.get_context_parallel_world_size() > 1,
        "context parallelism is not supported: set context_parallel_size to 1",
    )
    yield (
        bool(getattr(model, "num_moe_experts", None)) or parallel_state.get_expert_model_parallel_world_size() > 1,
        "mixtures of experts are not supported: their balancing averages over all replicas; train a dense model",
    )
    yield bool(getattr(model, "mtp_num_layers", None)), "multi-token prediction is not supported: unset mtp_num_layers"
    yield from _unsupported_parameters(chunks[0])


def _unsupported_parameters(chunk: Any) -> Iterator[tuple[bool, str]]:
    for name, parameter in chunk.named_parameters():
        yield (
            not getattr(parameter, "allreduce", True),
            f"{name} is an expert's: expert parallelism is not supported, train a dense model",
        )
        yield (
            getattr(parameter, "pipeline_parallel", False),
            f"{name} is copied on every pipeline stage, which is not supported",
        )
        yield (
            parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16),
            f"{name} is {parameter.dtype}: train in fp32, bf16 or fp16",
        )
