"""The model-parallel unit that tells DeepSpeed that data parallelism ends at the replica's edge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from lordo_ds.comm.groups import ReplicaGroups


class DataParallelOfReplica:
    """Answers to DeepSpeed's questions about data parallelism: it ends at the replica's edge.

    Every gradient reduction, norm and broadcast that DeepSpeed does over its data-parallel group thereby stays
    inside the replica.
    """

    groups: ReplicaGroups
    _all_replicas = False

    @contextmanager
    def over_all_replicas(self) -> Iterator[None]:
        """Answer for all replicas together, as data loaders must be told: each rank reads its own samples."""
        before, self._all_replicas = self._all_replicas, True
        try:
            yield
        finally:
            self._all_replicas = before

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


class ReplicaMPU(DataParallelOfReplica):
    """The `mpu` of a plain engine.

    Around a user's `mpu` it answers for the data-parallel group only; model-parallel questions go to the user's.
    Without one, nothing is model-parallel.
    """

    def __init__(self, groups: ReplicaGroups, wrapped: Any = None) -> None:
        self.groups = groups
        self.wrapped = wrapped

    # megatron-core's parallel_state has only the first of the three: the others follow from the group. An answer of 1
    # would make every tensor-parallel rank write the same checkpoint file.

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self._of_wrapped("get_model_parallel_group", lambda: self.groups.tensor)
        return group

    def get_model_parallel_world_size(self) -> int:
        group = self.get_model_parallel_group
        return int(self._of_wrapped("get_model_parallel_world_size", lambda: dist.get_world_size(group())))

    def get_model_parallel_rank(self) -> int:
        group = self.get_model_parallel_group
        return int(self._of_wrapped("get_model_parallel_rank", lambda: dist.get_rank(group())))

    def _of_wrapped(self, method: str, otherwise: Callable[[], Any]) -> Any:
        found = getattr(self.wrapped, method, None)
        return otherwise() if found is None else found()

    def __getattr__(self, name: str) -> Any:
        # DeepSpeed asks with hasattr; sequence-data-parallel groups would reach over the replica's edge.
        if name.startswith("_") or "data_parallel" in name or "sequence_parallel" in name:
            raise AttributeError(name)
        wrapped = self.__dict__.get("wrapped")
        if wrapped is None:
            raise AttributeError(name)
        return getattr(wrapped, name)
