"""Process groups of the replica mesh."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch.distributed as dist

from lordo_ds.core.mesh import ReplicaLayout
from lordo_ds.watch.timeouts import timeout_for_new_groups

_T = TypeVar("_T")

_groups: dict[tuple[object, str, tuple[int, ...]], dist.ProcessGroup] = {}


_purposes = itertools.count(1)


@dataclass(frozen=True)
class ReplicaGroups:
    """This rank's place on the mesh pipe x replica x shard x tensor, and its groups.

    `layout` holds the data-parallel ranks of this rank's stage and tensor index. `shard` spans those of this replica,
    `replica` those that hold the same shard in every replica, `tensor` the ranks that hold slices of the same
    matrices, `inside` every rank of this replica (of all stages, shards and tensor indices), `alone` this rank only.
    """

    layout: ReplicaLayout
    replica_index: int
    shard_index: int
    shard: dist.ProcessGroup
    replica: dist.ProcessGroup
    tensor: dist.ProcessGroup
    inside: dist.ProcessGroup
    alone: dist.ProcessGroup
    pipe_size: int = 1

    @property
    def tensor_size(self) -> int:
        return dist.get_world_size(self.tensor)


def replica_groups(
    layout: ReplicaLayout, tensor_ranks: Sequence[int] | None = None, pipe_size: int = 1
) -> ReplicaGroups:
    """The groups that this rank is a member of. Collective over all ranks.

    Args:
        layout: of this rank's data-parallel ranks.
        tensor_ranks: dist_ranks of this rank's tensor-parallel group, in its order; default: this rank only.
        pipe_size: pipeline stages.
    """
    me = dist.get_rank()
    replica_index, shard_index = layout.position(me)
    inside = [rank for rank, replica in enumerate(of_all_ranks(replica_index)) if replica == replica_index]
    shard, replica, tensor, everyone, alone = make_groups(
        [layout.shard_group(me), layout.replica_group(me), tensor_ranks or (me,), inside, (me,)]
    )
    return ReplicaGroups(
        layout=layout,
        replica_index=replica_index,
        shard_index=shard_index,
        shard=shard,
        replica=replica,
        tensor=tensor,
        inside=everyone,
        alone=alone,
        pipe_size=pipe_size,
    )


def own_purpose() -> str:
    """A name for groups that nothing else shares: two threads in one group would mix up their collectives.

    All ranks ask equally often. torch keeps the groups to the end of the process.
    """
    return f"streaming {next(_purposes)}"


def groups_for(purpose: str, groups: ReplicaGroups) -> ReplicaGroups:
    """The same ranks in process groups of their own, which no other collectives wait for. Collective over all ranks."""
    here = groups.shard, groups.replica, groups.tensor, groups.inside, groups.alone
    made = make_groups([dist.get_process_group_ranks(group) for group in here], purpose)
    shard, replica, tensor, inside, alone = made
    return replace(groups, shard=shard, replica=replica, tensor=tensor, inside=inside, alone=alone)


def make_groups(wanted: Sequence[Sequence[int]], purpose: str = "") -> list[dist.ProcessGroup]:
    """The process groups of these lists of ranks, each created once. Collective over all ranks, of the whole world.

    Those of one purpose are apart from those of another.

    Every rank creates the groups of all, in one order. With `use_local_synchronization` only its members would, but
    torch 2.13 names such a group by how many the rank is in already: where those counts differ (between pipeline
    stages, say), its members wait for each other for ever.
    """
    mine = [tuple(ranks) for ranks in wanted]
    for ranks in sorted({ranks for one in of_all_ranks(mine) for ranks in one}):
        # Keyed by the default group too: it may be destroyed and made anew in one process.
        if (dist.group.WORLD, purpose, ranks) not in _groups:
            _groups[dist.group.WORLD, purpose, ranks] = dist.new_group(list(ranks), timeout=timeout_for_new_groups())
    return [_groups[dist.group.WORLD, purpose, ranks] for ranks in mine]


def of_all_ranks(value: _T) -> list[_T]:
    """The value of every rank of the world, or of the one process that there is. Collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
