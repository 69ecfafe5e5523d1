"""What a sync tells: its report, and the numbers of each step that ride with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.errors import SyncError


@dataclass
class SyncReport:
    """What one sync did, as a user would ask; energies and drift are averages over replicas.

    `step` is where it began, `fragment` the fragment of the model that it was of, None for all of it. `seconds` are
    from its begin to its end on this rank; for `seconds_blocked` of them training waited, for what crosses replicas or,
    where the sync ran beside training, for its end. `outliers` are the replicas that were finite, but far from the
    others, and how far.
    """

    step: int
    replicas: int
    participants: int
    seconds: float = 0.0
    seconds_blocked: float = 0.0
    bytes_sent: int = 0
    drift: float = 0.0
    overlap: float | None = None
    captured_gradient_energy: float | None = None
    returned_to_anchor: bool = False
    outliers: dict[int, str] = field(default_factory=dict)
    basis_notes: dict[str, str] = field(default_factory=dict)
    fragment: int | None = None


class RowAverager:
    """Rows of numbers, one per step, averaged over all ranks in one reduction that rides with a sync.

    A pending row ends in how many ranks it is of: 1, or 0 where this one had no part in the step.
    """

    def __init__(self) -> None:
        self.pending: list[list[float]] = []
        self._averaged: list[list[float]] = []

    def add(self, values: Sequence[float]) -> None:
        self.pending.append([*values, 1.0])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows pending, and their length."""
        return len(self.pending), len(self.pending[0]) if self.pending else 0

    def reduce(self, wire: ReplicaWire, inside: InsideReplica, shapes: Tensor | None = None) -> None:
        """Average the pending rows. Collective.

        Args:
            shapes: (replicas, 2), every replica's `shape`; one that has made the last steps only has fewer rows.
                Default: all have this rank's.

        Raises:
            SyncError: the ranks of this replica recorded other rows than each other.
        """
        if inside.rows.size > 1:
            inside_shapes = inside.rows.gather(inside.vector(list(self.shape)), "rows")
            if not bool((inside_shapes == inside_shapes[0]).all()):
                raise SyncError(
                    "LoRDO: the ranks of a replica recorded different numbers of rows: call record() once per step on "
                    f"every rank, found (rows, values and a count) {inside_shapes.tolist()}"
                )
        count, length = self.shape if shapes is None else shapes.amax(0).tolist()
        if not count:
            return
        missed = [[0.0] * length] * (count - len(self.pending))
        table = torch.tensor(missed + self.pending, dtype=torch.float64, device=inside.device)
        inside.rows.sum_(table, "rows")
        wire.sum_(table, "rows")
        self._averaged += (table[:, :-1] / table[:, -1:]).tolist()
        self.pending = []

    def depart(self) -> RowAverager:
        """The pending rows, to be averaged apart from those that come; see `take_in`."""
        departed = RowAverager()
        departed.pending, self.pending = self.pending, []
        return departed

    def take_in(self, departed: RowAverager) -> None:
        """What has become of rows that departed: those averaged go before later ones."""
        self._averaged += departed.take()
        self.pending = departed.pending + self.pending

    def mark(self) -> tuple[list[list[float]], int]:
        """What `return_to` needs to undo what comes after."""
        return [list(row) for row in self.pending], len(self._averaged)

    def return_to(self, mark: tuple[list[list[float]], int]) -> None:
        self.pending = [list(row) for row in mark[0]]
        del self._averaged[mark[1] :]

    def take(self) -> list[list[float]]:
        """Rows averaged since the last call, in order."""
        rows, self._averaged = self._averaged, []
        return rows
