"""Bytes that a rank sent across replicas, by kind, since start and in the last sync."""

from __future__ import annotations

from collections import Counter


def reduction_bytes(payload_bytes: int, replicas: int) -> int:
    """Bytes one rank sends in an all-reduce: payload x 2 (M-1) / M, a ring's cost."""
    return payload_bytes * 2 * (replicas - 1) // replicas


def gather_bytes(payload_bytes: int, replicas: int) -> int:
    """Bytes one rank sends in an all-gather of `payload_bytes` per rank: payload x (M-1)."""
    return payload_bytes * (replicas - 1)


def data_parallel_bytes(gradient_bytes: int, replicas: int, replica_size: int) -> int:
    """Bytes that a rank sends across replicas for each step of data-parallel training.

    The ranks of a replica share its links: each takes its part of the gradients around the replicas, as in a sync.
    Of one replica alone: what its ranks send each other.
    """
    if replicas == 1:
        return reduction_bytes(gradient_bytes, replica_size)
    return reduction_bytes(-(-gradient_bytes // replica_size), replicas)


class ByteLedger:
    """Counts bytes sent across replicas by kind ("pseudo_gradient", "exp_avg", "header", ...)."""

    def __init__(self) -> None:
        self.by_kind: Counter[str] = Counter()

    def add(self, kind: str, sent_bytes: int) -> None:
        self.by_kind[kind] += sent_bytes

    @property
    def total_bytes(self) -> int:
        return sum(self.by_kind.values())

    def take_over(self, other: ByteLedger) -> None:
        """Count here what another one has counted, which then has counted nothing."""
        self.by_kind.update(other.by_kind)
        other.by_kind.clear()

    def state_dict(self) -> dict[str, int]:
        return dict(self.by_kind)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.by_kind = Counter(state)
