"""What a tensor must be to be stepped: whole, dense, real, here, and of full precision. Refused by name otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lordo_ds.core.local import is_distributed, local_part
from lordo_ds.errors import ConfigError

_SHARD_INSTEAD = (
    "to shard a replica, use fully_shard on the replica's ranks and LoRDO(..., mesh=mesh) (lordo_ds.replica_mesh makes "
    "one), or train through DeepSpeed's ZeRO"
)


def refuse_unsteppable(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that a replica cannot step and average by itself, projected or not.

    Raises:
        ConfigError: naming it, what it is, and what to do.
    """
    what = _unsteppable(tensor)
    if what is not None:
        raise ConfigError(f"LoRDO: {name} is {what}")


def _unsteppable(tensor: Tensor) -> str | None:
    kind, wrapper = type(tensor).__name__, bool(is_traceable_wrapper_subclass(tensor))
    if getattr(tensor, "_is_flat_param", False) or getattr(tensor, "_fsdp_flattened", False):
        # With use_orig_params the parameters keep their names; they are views into this rank's shard.
        return (
            "sharded by FullyShardedDataParallel, and a sync would overwrite one shard with another: "
            f"do not wrap the model in FSDP; {_SHARD_INSTEAD}"
        )
    if is_distributed(tensor):
        return (
            "a DTensor (fully_shard or parallelize_module), of which this rank holds a part: say which ranks are a "
            'replica: LoRDO(..., mesh=mesh), with a dimension "replica" (lordo_ds.replica_mesh makes one)'
        )
    if is_lazy(tensor):
        return "not initialised yet: run the model once before the first step"
    if wrapper:
        return f"a {kind} (a quantized or wrapped tensor): give plain fp32 parameters, and convert the model afterwards"
    if tensor.device.type == "meta":
        return "on the meta device, without values: give it storage (model.to_empty(...) and its initial values) first"
    if tensor.layout != torch.strided:
        return f"{str(tensor.layout).removeprefix('torch.')}: give a dense parameter"
    if tensor.is_complex():
        return f"{tensor.dtype}: give torch.view_as_real of it as the parameter"
    if tensor.dtype not in (torch.float32, torch.float64):
        return (
            f"{tensor.dtype}: give fp32 or fp64 parameters (with a MixedPrecisionPolicy fully_shard computes in bf16 "
            "all the same), or train through DeepSpeed's bf16 or fp16 mode, which keeps fp32 masters"
        )
    if not tensor.is_contiguous():
        return "not contiguous: make the parameter contiguous first"
    return None


def refuse_gradient(name: str, tensor: Tensor, gradient: Tensor) -> None:
    """Refuse a gradient that the inner step would stumble over, or read wrongly.

    Args:
        tensor: the one that is stepped.

    Raises:
        ConfigError: naming the parameter, and what to do.
    """
    if is_distributed(tensor) or is_distributed(gradient):
        ours, its = (getattr(one, "placements", "a whole tensor") for one in (tensor, gradient))
        if ours != its:
            raise ConfigError(
                f"LoRDO: the gradient of {name} is {its}, and the parameter {ours}: nothing has summed it over the "
                "tensor-parallel ranks; use fully_shard, which does, or give grad.redistribute(placements=...)"
            )
    if gradient.layout != torch.strided:
        raise ConfigError(f"LoRDO: the gradient of {name} is sparse: set sparse=False in its nn.Embedding")


def refuse_shared_memory(named: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse contiguous tensors that overlap: each would be stepped, and averaged, as if it were alone.

    Raises:
        ConfigError: naming both.
    """
    places = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), name)
        for name, tensor in ((name, local_part(whole)) for name, whole in named)
        if tensor.numel()
    )
    for (device, _, end, name), (next_device, start, _, next_name) in pairwise(places):
        if device == next_device and start < end:
            first, second = sorted((name, next_name), key=[name for name, _ in named].index)
            raise ConfigError(
                f"LoRDO: {first} and {second} share memory: give tied weights as one parameter, once "
                "(`b.weight = a.weight`, and named_parameters() without remove_duplicate=False)"
            )
