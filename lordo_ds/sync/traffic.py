"""What a rank sent, and how long it was blocked by that: by axis of the mesh and kind, in a step and in a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.ledger import Amounts, ByteLedger
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.replica.copies import TiedCopies

REPLICAS = "replicas"  # the axis of the wire; the others are inside a replica
Counted = dict[str, Amounts]  # by axis


def ledgers_inside(wire: ReplicaWire, inside: InsideReplica, tied: TiedCopies) -> dict[str, list[ByteLedger]]:
    """By axis inside a replica; one group of ranks may serve as several of them."""
    return {
        "shard": [inside.shard.ledger],
        "tensor": [inside.tensor.ledger],
        "pipe": [weight.comm.ledger for _, weight in tied.pairs],
        "twins": [wire.twins.ledger],
        "everyone": [inside.everyone.ledger],
    }


def counted_by_axis(ledgers: Mapping[str, Sequence[ByteLedger]]) -> Counted:
    """All that these have counted, once: of a group that serves as several axes under the first of them."""
    seen: set[int] = set()
    found = {}
    for axis, of_axis in ledgers.items():
        new = [ledger for ledger in of_axis if id(ledger) not in seen]
        seen.update(map(id, new))
        found[axis] = Amounts.of(new)
    return found


class Traffic:
    """The part of a rank's ledgers that belongs to the last attempted step, and to the last round.

    A round is the steps after one sync up to the next, with that sync. What is sent before the first step, to start, is
    the first step's; what is sent after the end of a step (a final sync) is that step's.

    Args:
        step: attempted steps so far.
        counted: before now, and so in no step.
    """

    def __init__(self, step: int = 0, counted: Counted | None = None) -> None:
        self._step = step
        self._at_begin = self._at_end = self._at_sync = counted or {}  # of the last step; and at the last sync's end
        self._round: Counted = {}
        self._round_steps = 0
        self._steps = 0  # since the last sync

    def end_step(self, step: int, synced: bool, counted: Counted) -> None:
        """Attempted step `step` has ended, with all that was counted so far; again, where more was sent after it."""
        if step != self._step:
            self._step, self._at_begin = step, self._at_end
            self._steps += 1
        self._at_end = counted
        if synced and self._steps:
            self._round, self._round_steps = _since(self._at_sync, counted), self._steps
            self._at_sync, self._steps = counted, 0

    @property
    def last_step(self) -> Counted:
        return _since(self._at_begin, self._at_end)

    @property
    def round(self) -> tuple[Counted, int]:
        """Of the last round, and its steps; before the first sync, of the steps so far."""
        if self._round_steps:
            return self._round, self._round_steps
        return _since(self._at_sync, self._at_end), self._steps

    @property
    def bytes_per_step(self) -> float:
        """Sent across replicas: the average over `round`."""
        counted, steps = self.round
        return counted[REPLICAS].total_bytes / steps if steps else 0.0

    @property
    def blocked_per_step_s(self) -> float:
        """Seconds for which what crosses replicas blocked a step: the average over `round`."""
        counted, steps = self.round
        return counted[REPLICAS].total_seconds / steps if steps else 0.0


def _since(before: Counted, now: Counted) -> Counted:
    return {axis: amounts.since(before.get(axis, Amounts())) for axis, amounts in now.items()}
