"""What a rank sent in a group, and how long it was blocked by that, by kind."""

from __future__ import annotations

import threading
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
    """Counts by kind ("pseudo_gradient", "exp_avg", "header", ...) what a rank sent in one group. From any thread.

    `by_kind` are bytes since the start of the run, saved and restored with it; `seconds_by_kind` the wall clock for
    which the threads that sent or received were blocked, since the start of this process.
    """

    def __init__(self) -> None:
        self.by_kind: Counter[str] = Counter()
        self.seconds_by_kind: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, kind: str, sent_bytes: int, seconds: float = 0.0) -> None:
        with self._lock:
            if sent_bytes:  # a rank that only receives a broadcast sends nothing
                self.by_kind[kind] += sent_bytes
            self.seconds_by_kind[kind] = self.seconds_by_kind.get(kind, 0.0) + seconds

    @property
    def total_bytes(self) -> int:
        return sum(list(self.by_kind.values()))

    @property
    def total_seconds(self) -> float:
        return sum(list(self.seconds_by_kind.values()), 0.0)

    def state_dict(self) -> dict[str, int]:
        return dict(self.by_kind)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.by_kind = Counter(state)
