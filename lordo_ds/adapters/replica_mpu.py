"""The model-parallel unit that tells DeepSpeed that data parallelism ends at the replica's edge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from lordo_ds.dist.groups import ReplicaGroups


class ReplicaMPU:
    """What DeepSpeed asks of an `mpu`: its data-parallel group is one replica.

    Every gradient reduction, norm and broadcast that DeepSpeed does over its data-parallel group thereby stays
    inside the replica. Around a user's `mpu` it answers for the data-parallel group only; model-parallel
    questions go to the user's. Without one, nothing is model-parallel.
    """

    def __init__(self, groups: ReplicaGroups, wrapped: Any = None) -> None:
        self.groups = groups
        self.wrapped = wrapped
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

    def get_data_parallel_src_rank(self) -> int:
        return self.get_data_parallel_group_ranks()[0]

    def get_data_parallel_world_size(self) -> int:
        layout = self.groups.layout
        return layout.replica_size * (layout.replica_count if self._all_replicas else 1)

    def get_data_parallel_rank(self) -> int:
        groups = self.groups
        before = groups.replica_index * groups.layout.replica_size if self._all_replicas else 0
        return before + groups.shard_index

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._of_wrapped("get_model_parallel_group", self.groups.alone)

    def get_model_parallel_world_size(self) -> int:
        return self._of_wrapped("get_model_parallel_world_size", 1)

    def get_model_parallel_rank(self) -> int:
        return self._of_wrapped("get_model_parallel_rank", 0)

    def _of_wrapped(self, method: str, otherwise: Any) -> Any:
        # megatron-core's parallel_state has only the first of the three.
        found = getattr(self.wrapped, method, None)
        return otherwise if found is None else found()

    def __getattr__(self, name: str) -> Any:
        # DeepSpeed asks with hasattr; sequence-data-parallel groups would reach over the replica's edge.
        if name.startswith("_") or "data_parallel" in name or "sequence_parallel" in name:
            raise AttributeError(name)
        wrapped = self.__dict__.get("wrapped")
        if wrapped is None:
            raise AttributeError(name)
        return getattr(wrapped, name)
