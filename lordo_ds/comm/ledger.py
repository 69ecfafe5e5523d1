"""What a rank sent in a group, and how long it was blocked by that, by kind."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


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


@dataclass(frozen=True)
class Amounts:
    """Bytes sent and seconds blocked, by kind; kinds of which there was nothing are left out."""

    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, ledgers: Iterable[ByteLedger]) -> Amounts:
        """All that these have counted, together."""
        sent, seconds = Counter[str](), dict[str, float]()
        for ledger in ledgers:
            sent.update(dict(ledger.by_kind))
            for kind, blocked in dict(ledger.seconds_by_kind).items():  # a copy: another thread may enter a new kind
                seconds[kind] = seconds.get(kind, 0.0) + blocked
        return cls(dict(sent), seconds)

    def since(self, before: Amounts) -> Amounts:
        """What came after that."""
        sent = {kind: count - before.bytes.get(kind, 0) for kind, count in self.bytes.items()}
        seconds = {kind: blocked - before.seconds.get(kind, 0.0) for kind, blocked in self.seconds.items()}
        return Amounts({k: v for k, v in sent.items() if v}, {k: v for k, v in seconds.items() if v})

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


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

    def take_over(self, other: ByteLedger) -> None:
        """Count here what another one has counted, which then has counted nothing."""
        for kind, sent_bytes in other.by_kind.items():
            self.add(kind, sent_bytes)  # whoever waited for it did so elsewhere
        other.by_kind.clear()
        other.seconds_by_kind.clear()

    def state_dict(self) -> dict[str, int]:
        return dict(self.by_kind)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.by_kind = Counter(state)
