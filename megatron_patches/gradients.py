"""The gradient sums over tensor-parallel ranks that Megatron's own loop does, for loops that do not.

Most parameters that every tensor-parallel rank holds whole have the same gradient on all of them. Some have a part
of it on each: the norms of queries and keys, because a rank has some of the heads only, and with sequence
parallelism everything that sees a part of the sequence only. Megatron sums those in `finalize_model_grads`
(`_allreduce_non_tensor_model_parallel_grads`), which DeepSpeed does not call. Left alone, the copies of such a
parameter drift apart.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lordo_ds.comm.ledger import ByteLedger, reduction_bytes
from megatron_patches.params import MegatronParameter, describe_model
from megatron_patches.versions import require_parameters, require_supported_version


class GradientSums:
    """The hooks of one model; `remove()` takes them off, `ledger` counts what this rank sent."""

    def __init__(self, names: list[str], handles: list[Any], ledger: ByteLedger) -> None:
        self.names = names
        """The parameters whose gradients are summed or averaged; empty without tensor parallelism."""
        self.ledger = ledger
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks off; calling it again changes nothing."""
        while self._handles:
            self._handles.pop().remove()


def sum_partial_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> GradientSums:
    """Sum partial gradients over the tensor-parallel ranks as they arise.

    A hook on the parameter's tensor runs before the gradient is accumulated and before DeepSpeed's own hooks see
    it, once per backward pass; so this works at every ZeRO stage, with gradient accumulation and with activation
    recomputation. Register before or after the engine is built. The ranks of the group run the same graph, so the
    reductions come in the same order on all of them. Each sums in fp32.

    Args:
        model: with Megatron's attributes on its parameters.
        group: the tensor-parallel ranks; default: Megatron's.

    Returns:
        The hooks that were put on; none where the group is one rank.
    """
    if group is None:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
    size, ledger = dist.get_world_size(group), ByteLedger()
    names: list[str] = []
    handles: list[Any] = []
    if size > 1:
        _check_whose_work_this_is()
        for parameter, facts in describe_model(model):
            if parameter.requires_grad and (facts.averaged_over_tensor_ranks or is_partial(facts)):
                divisor = size if facts.averaged_over_tensor_ranks else 1
                names.append(facts.name)
                handles.append(parameter.register_hook(partial(_sum, group=group, divisor=divisor, ledger=ledger)))
    return GradientSums(names, handles, ledger)


def is_partial(facts: MegatronParameter) -> bool:
    """Whether each tensor-parallel rank computes a part of this parameter's gradient."""
    return facts.dim is None and (facts.sequence_parallel or facts.query_or_key_norm)


def _check_whose_work_this_is() -> None:
    """If Megatron's own function changes, other parameters may need a sum."""
    require_supported_version()
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    require_parameters(module, "_allreduce_non_tensor_model_parallel_grads", ("model", "config", "tp_group"))


def _sum(gradient: Tensor, group: dist.ProcessGroup, divisor: int, ledger: ByteLedger) -> Tensor:
    total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True).contiguous()
    dist.all_reduce(total, group=group)
    ledger.add("tensor_parallel", reduction_bytes(total.numel() * total.element_size(), dist.get_world_size(group)))
    return (total / divisor).to(gradient.dtype) if divisor > 1 else total.to(gradient.dtype)
