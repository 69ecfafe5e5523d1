"""Where the elements of a DTensor lie: the slice of a tensor-parallel rank, and the rows of it that a shard holds.

`fully_shard` cuts a parameter, or its tensor-parallel slice, along its first dimension as `torch.chunk` does: the last
shards hold less, or nothing. Written against torch 2.13. Plain values only, no processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from lordo_ds.core.fragments import Interval
from lordo_ds.core.grouping import ParameterFacts
from lordo_ds.errors import ConfigError

# Of a mesh dimension: what it does to a parameter.
SHARD, TENSOR = "shard", "tensor"


def sliced_facts(fact: ParameterFacts, placements: Mapping[str, Any], slices: int) -> ParameterFacts:
    """Of the slice that a tensor-parallel rank holds.

    Args:
        fact: of the whole parameter.
        placements: torch's, by what the mesh dimension does.
        slices: tensor-parallel ranks.

    Raises:
        ConfigError: it is sliced in a way that is not supported.
    """
    placement = placements.get(TENSOR)
    if placement is None or placement.is_replicate():
        return fact
    dim = _dim_of(placement)
    if dim is None:
        raise ConfigError(f"LoRDO: {fact.name} is {placement!r} over the tensor-parallel ranks: use Shard or Replicate")
    if fact.shape[dim] % slices:
        raise ConfigError(
            f"LoRDO: dimension {dim} of {fact.name} {fact.shape} is sliced over {slices} tensor-parallel ranks and no "
            "multiple of them: make it one, or leave it out of the plan"
        )
    shape = tuple(size // slices if d == dim else size for d, size in enumerate(fact.shape))
    return dataclasses.replace(fact, shape=shape, partition_dim=dim, partitions=slices)


def shard_intervals(fact: ParameterFacts, placements: Mapping[str, Any], shards: int) -> tuple[Interval, ...]:
    """The elements [start, stop) that every shard holds of this rank's slice, (0, 0) where it holds none.

    Args:
        fact: of the slice.
        placements: torch's, by what the mesh dimension does.

    Raises:
        ConfigError: it is not cut along its first dimension.
    """
    numel = prod(fact.shape)
    if shards == 1:
        return ((0, numel),)
    placement = placements.get(SHARD)
    dim = None if placement is None else _dim_of(placement)
    if dim is None:
        raise ConfigError(
            f"LoRDO: {fact.name} is not sharded over the {shards} shards of a replica, and its gradient not averaged "
            'over them: call fully_shard(module, mesh=mesh["shard"]) for the module that holds it, on the model itself '
            "last (lordo_ds.shard_model does)"
        )
    if dim:
        raise ConfigError(
            f"LoRDO: {fact.name} is sharded along dimension {dim}: only the first one, 0, is supported: leave it out "
            "of shard_placement_fn"
        )
    rows, row_numel = fact.shape[0], prod(fact.shape[1:])
    height = -(-rows // shards)
    cuts = [(min(i * height, rows) * row_numel, min((i + 1) * height, rows) * row_numel) for i in range(shards)]
    return tuple((start, stop) if start < stop else (0, 0) for start, stop in cuts)


def _dim_of(placement: Any) -> int | None:
    """Along which dimension a placement cuts; None: it does not. Strided shards cut a slice that is cut already."""
    cuts = type(placement).__name__ in ("Shard", "_StridedShard")
    return int(placement.dim) if cuts else None


def dims_of_mesh(
    name: str, dims: Sequence[tuple[str, tuple[int, ...]]], of_role: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What each dimension of a parameter's mesh does: "shard" or "tensor".

    Args:
        name: of the parameter.
        dims: name and dist_ranks of each dimension, those of this rank's line through the mesh.
        of_role: the same dist_ranks by what they do in LoRDO's mesh, with "replica".

    Raises:
        ConfigError: one of them crosses replicas, or is none of the mesh's.
    """
    found: list[str] = []
    for called, ranks in dims:
        crossing = set(ranks) & set(of_role["replica"])
        if len(crossing) > 1:
            raise ConfigError(
                f"LoRDO: {name} is on a mesh whose ranks {list(ranks)} belong to {len(crossing)} replicas: its "
                "gradient would be averaged across them at every step; shard inside the replica only, with "
                'fully_shard(module, mesh=mesh["shard"]) (lordo_ds.shard_model does): LoRDO averages the replicas'
            )
        fits = [role for role in (SHARD, TENSOR) if of_role[role] == ranks and role not in found]
        if not fits:
            raise ConfigError(
                f"LoRDO: {name} is on a mesh whose ranks {list(ranks)} are neither the shards "
                f"{list(of_role[SHARD])} of a replica nor its tensor-parallel ranks {list(of_role[TENSOR])}: use the "
                "mesh that LoRDO is given"
            )
        found.append(called if called in fits else fits[0])
    return found
