"""Tensor and pipeline parallelism of `pretrain_gpt.py`: legal sizes, what is counted once, the gradient norm."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from pretrain.gpt import GptConfig


def check_parallel_sizes(model: GptConfig, tensor: int, pipe: int) -> None:
    """Refuse sizes that the ranks or the model cannot be divided by.

    Raises:
        ValueError: one line naming the option, the rule and the nearest legal value.
    """
    for flag, value in (("--tensor-parallel", tensor), ("--pipeline-parallel", pipe)):
        if value < 1:
            raise ValueError(f"{flag} {value}: must be at least 1")
    if not _can_be_cut(model, tensor):
        legal = [size for size in range(1, model.num_attention_heads + 1) if _can_be_cut(model, size)]
        groups = model.num_query_groups or model.num_attention_heads
        raise ValueError(
            f"--tensor-parallel {tensor}: must divide num_attention_heads {model.num_attention_heads}, ffn_hidden_size "
            f"{model.ffn_hidden_size} and vocab_size {model.vocab_size}, and divide num_query_groups {groups} or be a "
            f"multiple of it (nearest: {min(legal, key=lambda size: abs(size - tensor))})"
        )
    if pipe > model.num_layers:
        raise ValueError(
            f"--pipeline-parallel {pipe}: must be at most num_layers {model.num_layers} (nearest: {model.num_layers})"
        )
    world, replica = int(os.environ.get("WORLD_SIZE", "1")), tensor * pipe
    if world % replica:
        below, above = world // replica * replica, (world // replica + 1) * replica
        nearest = f"{below} or {above}" if below else above
        raise ValueError(
            f"--tensor-parallel {tensor} --pipeline-parallel {pipe}: the number of ranks must be a multiple of "
            f"{replica}, not {world} (nearest: {nearest})"
        )


def _can_be_cut(model: GptConfig, tensor: int) -> bool:
    groups = model.num_query_groups or model.num_attention_heads
    lengths = (model.num_attention_heads, model.ffn_hidden_size, model.vocab_size)
    return all(length % tensor == 0 for length in lengths) and (groups % tensor == 0 or tensor % groups == 0)


def check_saved_sizes(folder: Path, tensor: int, pipe: int) -> None:
    """Refuse to resume from a checkpoint of other sizes, as its file names tell."""
    tag = (folder / "latest").read_text(encoding="utf-8").strip()
    names = [path.name for path in (folder / tag).rglob("*model_states.pt")]
    both = {found[1] for name in names if (found := re.search(r"mp_rank_(\d+)", name))}
    layers = {found[1] for name in names if (found := re.match(r"layer_\d+-model_(\d+)", name))}
    saved_tensor = len(layers or both)
    saved = (saved_tensor, len(both) // saved_tensor) if both else (tensor, pipe)
    if saved != (tensor, pipe):
        raise ValueError(
            f"--resume: {folder / tag} was saved with --tensor-parallel {saved[0]} --pipeline-parallel {saved[1]}, "
            f"this run has {tensor} and {pipe}: give the same"
        )


def elements_here(module: nn.Module) -> int:
    """Elements of this rank's parameters: its stage's, and its tensor-parallel part of each."""
    return sum(_elements(parameter) for parameter in module.parameters())


def elements_in_all(module: nn.Module) -> int:
    """Elements of the whole model: parts added up, copies counted once. Collective over the stages and parts."""
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator
    from megatron.core import parallel_state

    own = sum(_elements(parameter) for parameter in counted_here(module))
    total = torch.tensor(own, device=get_accelerator().current_device_name())
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total)


def _elements(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 empties the parameter


def counted_here(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that this rank counts, so that all ranks of the model-parallel group count each element once.

    Where every tensor-parallel rank has all of a parameter the first counts it; of a tied weight the first stage's.
    """
    from megatron.core import parallel_state

    first = parallel_state.get_tensor_model_parallel_rank() == 0
    for parameter in module.parameters():
        copied = getattr(parameter, "ds_pipe_replicated", False)
        if not copied and (first or getattr(parameter, "tensor_model_parallel", False)):
            yield parameter


def use_right_norms(engine: Any) -> None:
    """Mend the norm of gradients that DeepSpeed 0.19.8 takes at stage 0 on a model-parallel mesh, as for LoRDO."""
    from megatron.core import parallel_state

    from lordo_ds.adapters.deepspeed import stage0
    from lordo_ds.adapters.deepspeed.hook import DEEPSPEED_VERSION

    if not engine.zero_optimization():
        tensor = parallel_state.get_tensor_model_parallel_group()
        stage0.own_norm(engine, tensor, parallel_state.get_model_parallel_group(), DEEPSPEED_VERSION)
