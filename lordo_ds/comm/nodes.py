"""Cuts the data-parallel ranks into replicas, along the nodes where `replica_size` asks for that."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch.distributed as dist

from lordo_ds.comm.groups import of_all_ranks
from lordo_ds.core.mesh import ReplicaLayout, replica_layout
from lordo_ds.errors import ConfigError


def layout_of_replicas(data_parallel_ranks: Sequence[int], replica_size: int | str, key: str) -> ReplicaLayout:
    """The replicas of these ranks, which are one of the mesh's data-parallel groups. Collective over all ranks.

    Args:
        key: what the user calls `replica_size`, for messages.

    Raises:
        ConfigError: the size does not divide their number, or is "node" and nodes cannot be told or differ.
    """
    per_node = _on_each_node(data_parallel_ranks, key) if replica_size == "node" else 0
    return replica_layout(data_parallel_ranks, replica_size, per_node, key)


def _on_each_node(ranks: Sequence[int], key: str) -> int:
    """How many of these ranks share a node; refused unless all ranks find the same number. Collective."""
    size = _ranks_per_node(key)
    nodes = [rank // size for rank in ranks]
    counts = {nodes.count(node) for node in nodes}
    mine = counts.pop() if len(counts) == 1 and nodes == sorted(nodes) else 0
    if set(of_all_ranks(mine)) != {mine} or mine == 0:
        raise ConfigError(
            f'LoRDO: {key} = "node" needs equally many data-parallel ranks of each pipeline '
            f"stage on every node, next to each other: give a number that divides {len(ranks)}"
        )
    return mine


def _ranks_per_node(key: str) -> int:
    """Ranks on every node; refused unless each has equally many, numbered one after the other. Collective."""
    world, me = dist.get_world_size(), dist.get_rank()
    stated = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    size = int(stated) if stated is not None else (1 if world == 1 else 0)
    local = int(os.environ.get("LOCAL_RANK", me % max(size, 1)))
    sizes, first_ranks = zip(*of_all_ranks((size, me - local)), strict=True)
    if 0 in sizes:
        raise ConfigError(
            f'LoRDO: {key} = "node" needs LOCAL_WORLD_SIZE, which torchrun and other '
            "launchers set: set it to the number of ranks on each node"
        )
    if len(set(sizes)) > 1 or any(first != rank // size * size for rank, first in enumerate(first_ranks)):
        raise ConfigError(
            f'LoRDO: {key} = "node" needs equally many consecutive ranks on every node, found '
            f"{list(sizes)}: give a number that divides {world}"
        )
    return size
