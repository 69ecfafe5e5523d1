"""The weights of tests/problems.py in a model that `fully_shard` and `parallelize_module` cut, with given gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lordo_ds
from tests import problems

# The dimension that tensor parallelism slices; the others are whole on every tensor-parallel rank.
SLICED = {"tall": 0, "long": 0, "wide": 1, "square": 1}


class Weights(nn.Module):
    """Every matrix is the weight of a linear layer without a bias, applied to the unit vectors.

    The sum of its outputs times numbers that are given has these numbers as gradient, exactly.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, value in problems.initial_weights(dtype).items():
            if value.dim() == 1:
                self.register_parameter(name, nn.Parameter(value))
                continue
            layer = nn.Linear(value.shape[1], value.shape[0], bias=False, dtype=dtype)
            layer.weight = nn.Parameter(value)
            self.add_module(name, layer)

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        """Args: the part of each layer's output that this rank has is that of its slice of the rows."""
        total: Tensor = (self.bias * gradients["bias"]).sum()
        for name, layer in self.named_children():
            gradient = gradients[name]
            outputs = layer(torch.eye(layer.in_features, dtype=gradient.dtype))  # the weight transposed
            total = total + (outputs * gradient.mT).sum()
        return total


def replicas_of(shards: int, tensor: int, dtype: torch.dtype, **options: Any) -> tuple[Weights, Any]:
    """The model on a mesh of replicas, and the mesh."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = lordo_ds.replica_mesh("cpu", shards, tensor)
    model = Weights(dtype)
    if tensor > 1:
        styles = {0: ColwiseParallel, 1: lambda: RowwiseParallel(input_layouts=Replicate())}
        parallelize_module(model, mesh["tensor"], {name: styles[dim]() for name, dim in SLICED.items()})
    return lordo_ds.shard_model(model, mesh, [model.tall, model.wide], **options), mesh


def given(step: int, replica: int, shard: int, shards: int, tensor: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients of one data-parallel rank; of layers that are sliced along their rows this slice's.

    Args:
        tensor: (this rank's tensor-parallel index, how many there are).
    """
    index, slices = tensor
    gradients = problems.gradients(step, replica * shards + shard, dtype)
    for name, dim in SLICED.items():
        if dim == 0:
            gradients[name] = gradients[name].chunk(slices)[index]
    return gradients


def whole(parameter: Any) -> Tensor:
    """A copy of all of a DTensor, or of a plain one. Collective over its mesh."""
    full = getattr(parameter, "full_tensor", None)
    return (parameter if full is None else full()).detach().clone()


def place_of(mesh: Any) -> tuple[int, int, int]:
    """(replica, shard, tensor-parallel index) of this rank."""
    here = dict(zip(mesh.mesh_dim_names, mesh.get_coordinate(), strict=True))
    return here["replica"], here["shard"], here.get("tensor", 0)


def replica_of_each_rank(shards: int, tensor: int) -> list[int]:
    return [rank // (shards * tensor) for rank in range(dist.get_world_size())]
