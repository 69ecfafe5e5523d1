"""What a parameter of a Megatron model is, read from its name and attributes, and its parts put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MegatronParameter:
    """What Megatron's attributes say of one parameter; `shape` is this rank's part.

    Megatron sets the attributes at a tensor-parallel size of 1 too, so they describe what the parameter is, not
    whether it is cut just now.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    """Which dimension tensor parallelism cuts; None: every rank has all of it."""
    stride: int = 1
    """Blocks along `dim` that are cut one by one: 2 for a gated `linear_fc1`, whose halves are gate and up."""
    embedding_or_output: bool = False
    tied: bool = False
    """Embedding and output weight in one, in two copies on the first and last of Megatron's pipeline stages."""
    expert: bool = False
    sequence_parallel: bool = False
    """Used on a part of the sequence only, so its gradient is a part of a sum over the tensor-parallel ranks."""
    averaged_over_tensor_ranks: bool = False
    """Its gradient is to be averaged over the tensor-parallel ranks."""

    @property
    def fused_qkv(self) -> bool:
        """Queries, keys and values in one: group by group, each with its queries first, then key, then value.

        Tensor parallelism cuts between groups, so the parts follow one another and the stride is 1.
        """
        return ".linear_qkv." in f".{self.name}"

    @property
    def gated(self) -> bool:
        """A rank's part is [its share of the gate; its share of up]."""
        return self.stride == 2

    @property
    def query_or_key_norm(self) -> bool:
        return "q_layernorm" in self.name or "k_layernorm" in self.name


def describe(name: str, parameter: nn.Parameter) -> MegatronParameter:
    """Read a parameter's attributes; one that Megatron did not make is whole on every rank."""
    dim = getattr(parameter, "partition_dim", -1)
    cut = dim >= 0 and getattr(parameter, "tensor_model_parallel", False)
    return MegatronParameter(
        name=name,
        shape=tuple(getattr(parameter, "ds_shape", parameter.shape)),  # ZeRO-3 empties the parameter
        dim=dim if cut else None,
        stride=getattr(parameter, "partition_stride", 1) if cut else 1,
        embedding_or_output=bool(getattr(parameter, "is_embedding_or_output_parameter", False)),
        tied=bool(getattr(parameter, "shared_embedding", False)),
        expert=not getattr(parameter, "allreduce", True),
        sequence_parallel=bool(getattr(parameter, "sequence_parallel", False)),
        averaged_over_tensor_ranks=bool(getattr(parameter, "average_gradients_across_tp_domain", False)),
    )


def describe_model(model: nn.Module) -> Iterator[tuple[nn.Parameter, MegatronParameter]]:
    """Every parameter of a model with its description, in the order of `named_parameters`."""
    for name, parameter in model.named_parameters():
        yield parameter, describe(name, parameter)


def whole(shards: Sequence[Tensor], dim: int | None, stride: int = 1) -> Tensor:
    """The parameter that these parts, in the order of their tensor-parallel ranks, were cut from.

    It is what a tensor-parallel size of 1 holds: for a gated `linear_fc1` the whole gate, then the whole of up.

    Args:
        shards: of equal shapes.
        dim: along which they were cut; None: each is the whole already.
        stride: blocks along `dim` that were cut one by one.
    """
    if dim is None:
        return shards[0]
    blocks = [shard.chunk(stride, dim) for shard in shards]
    if any(len(cut) != stride for cut in blocks):
        raise ValueError(f"dimension {dim} of {tuple(shards[0].shape)} cannot be cut into {stride} blocks")
    return torch.cat([cut[block] for block in range(stride) for cut in blocks], dim)


def shard_of(tensor: Tensor, dim: int | None, stride: int, index: int, count: int) -> Tensor:
    """The part of tensor-parallel rank `index` of `count`; the inverse of `whole`.

    Raises:
        ValueError: the dimension cannot be cut into that many equal parts.
    """
    if dim is None:
        return tensor
    if tensor.shape[dim] % (stride * count):
        raise ValueError(
            f"dimension {dim} of {tuple(tensor.shape)} must be a multiple of {stride * count} "
            f"to be cut for {count} tensor-parallel ranks"
        )
    parts = tensor.chunk(stride * count, dim)
    return torch.cat(parts[index::count], dim)
