"""The model-parallel unit that tells DeepSpeed that data parallelism ends at the replica's edge."""

from __future__ import annotations

from contextlib import contextmanager
from collections.abc import Iterator

import torch.distributed as dist

from lordo_ds.dist.groups import ReplicaGroups


class ReplicaMPU:
    """What DeepSpeed asks of an `mpu`: its data-parallel group is one replica, nothing is model-parallel.

    Every gradient reduction, norm and broadcast that DeepSpeed does over its data-parallel group thereby stays
    inside the replica.
    """

    def __init__(self, groups: ReplicaGroups) -> None:
        self.groups = groups
        self._all_replicas = False

    @contextmanager
    def over_all_replicas(self) -> Iterator[None]:
        """Answer for all replicas together, as data loaders must be told: each rank reads its own samples."""
        self._all_replicas = True
        try:
            yield
        finally:
            self._all_replicas = False

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.shard

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.groups.shard)

    def get_data_parallel_world_size(self) -> int:
        layout = self.groups.layout
        return layout.replica_size * (layout.replica_count if self._all_replicas else 1)

    def get_data_parallel_rank(self) -> int:
        groups = self.groups
        before = groups.replica_index * groups.layout.replica_size if self._all_replicas else 0
        return before + groups.shard_index

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.alone

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0
