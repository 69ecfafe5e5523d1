"""What a sync tells: its report, and the numbers of each step that ride with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lordo_ds.dist.inside import InsideReplica
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

    def reduce(self, wire: ReplicaWire, inside: InsideReplica) -> None:
        """Average the pending rows. Collective: every rank has recorded equally many."""
        if not self.pending:
            return
        table = torch.tensor(self.pending, dtype=torch.float64, device=inside.device)
        inside.rows.sum_(table, "rows")
        wire.sum_(table, "rows").div_(wire.replicas * inside.rows.size)
        self._averaged += table.tolist()
        self.pending = []

    def take(self) -> list[list[float]]:
        """Rows averaged since the last call, in order."""
        rows, self._averaged = self._averaged, []
        return rows


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every element of every tensor is finite, without a mask of their size."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    for group in by_dtype.values():
        peaks = torch.stack([peak.float() for peak in torch._foreach_norm(group, float("inf"))])
        if not bool(torch.isfinite(peaks).all()):
            return False
    return True
