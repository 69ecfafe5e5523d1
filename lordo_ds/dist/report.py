"""What a sync tells: its report, and the numbers of each step that ride with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lordo_ds.dist.shards import ShardComm
from lordo_ds.dist.wire import ReplicaWire


@dataclass
class SyncReport:
    """What one sync did, as a user would ask; energies and drift are averages over replicas."""

    step: int
    replicas: int
    participants: int
    seconds: float = 0.0
    bytes_sent: int = 0
    drift: float = 0.0
    overlap: float | None = None
    captured_gradient_energy: float | None = None
    returned_to_anchor: bool = False
    basis_notes: dict[str, str] = field(default_factory=dict)


class RowAverager:
    """Rows of numbers, one per step, averaged over all ranks in one reduction that rides with a sync."""

    def __init__(self) -> None:
        self.pending: list[list[float]] = []
        self._averaged: list[list[float]] = []

    def reduce(self, wire: ReplicaWire, shard: ShardComm, device: torch.device) -> None:
        """Average the pending rows. Collective: every rank has recorded equally many."""
        if not self.pending:
            return
        table = torch.tensor(self.pending, dtype=torch.float64, device=device)
        shard.sum_(table, "rows")
        wire.sum_(table, "rows").div_(wire.replicas * shard.size)
        self._averaged += table.tolist()
        self.pending = []

    def take(self) -> list[list[float]]:
        """Rows averaged since the last call, in order."""
        rows, self._averaged = self._averaged, []
        return rows
