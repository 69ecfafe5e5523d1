"""Process groups of the replica mesh."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from lordo_ds.core.mesh import ReplicaLayout

_groups: dict[tuple[object, tuple[int, ...]], dist.ProcessGroup] = {}


@dataclass(frozen=True)
class ReplicaGroups:
    """This rank's place on the mesh and its groups.

    `shard` spans the ranks of this replica, `replica` those that hold the same shard in every replica,
    `alone` this rank only.
    """

    layout: ReplicaLayout
    replica_index: int
    shard_index: int
    shard: dist.ProcessGroup
    replica: dist.ProcessGroup
    alone: dist.ProcessGroup


def replica_groups(layout: ReplicaLayout) -> ReplicaGroups:
    """Create (once per process and default group) the groups that this rank is a member of.

    Collective over the members of each group only; every member calls it with the same layout.
    """
    me = dist.get_rank()
    replica_index, shard_index = layout.position(me)
    return ReplicaGroups(
        layout=layout,
        replica_index=replica_index,
        shard_index=shard_index,
        shard=_group(layout.shard_group(me)),
        replica=_group(layout.replica_group(me)),
        alone=_group((me,)),
    )


def _group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    # Keyed by the default group too: it may be destroyed and made anew in one process.
    key = (dist.group.WORLD, ranks)
    if key not in _groups:
        _groups[key] = dist.new_group(list(ranks), use_local_synchronization=True)
    return _groups[key]
