"""Which data-parallel ranks form a replica, and which hold the same shard across replicas. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lordo_ds.errors import ConfigError


@dataclass(frozen=True)
class ReplicaLayout:
    """Data-parallel ranks as replica x shard (replica slowest), given by their global dist_ranks."""

    replicas: tuple[tuple[int, ...], ...]

    @property
    def replica_count(self) -> int:
        return len(self.replicas)

    @property
    def replica_size(self) -> int:
        return len(self.replicas[0])

    def position(self, dist_rank: int) -> tuple[int, int]:
        """(replica index, shard index) of a dist_rank."""
        for index, ranks in enumerate(self.replicas):
            if dist_rank in ranks:
                return index, ranks.index(dist_rank)
        raise ValueError(f"dist_rank {dist_rank} is in none of the replicas {self.replicas}")

    def shard_group(self, dist_rank: int) -> tuple[int, ...]:
        """The ranks of this rank's replica."""
        return self.replicas[self.position(dist_rank)[0]]

    def replica_group(self, dist_rank: int) -> tuple[int, ...]:
        """The ranks that hold this rank's shard, one per replica."""
        shard = self.position(dist_rank)[1]
        return tuple(ranks[shard] for ranks in self.replicas)


def replica_layout(
    data_parallel_ranks: Sequence[int],
    replica_size: int | str,
    ranks_per_node: int,
    key: str = "replica_size",
) -> ReplicaLayout:
    """Cut the data-parallel ranks into replicas of consecutive ranks.

    Args:
        data_parallel_ranks: global dist_ranks, in data-parallel order.
        replica_size: data-parallel ranks per replica, "node" (those of one node) or "all" (one replica).
        ranks_per_node: data-parallel ranks on one node, for "node".
        key: what the user calls `replica_size`, for messages.

    Raises:
        ConfigError: the size does not divide the number of data-parallel ranks.
    """
    total = len(data_parallel_ranks)
    named = {"all": total, "node": ranks_per_node}
    size = named[replica_size] if isinstance(replica_size, str) else replica_size
    if total % size:
        legal = [n for n in range(1, total + 1) if total % n == 0]
        nearest = min(legal, key=lambda n: abs(n - size))
        raise ConfigError(
            f"LoRDO: {key} = {replica_size!r} must divide the data-parallel size {total} (nearest: {nearest})"
        )
    ranks = tuple(data_parallel_ranks)
    return ReplicaLayout(tuple(ranks[start : start + size] for start in range(0, total, size)))
