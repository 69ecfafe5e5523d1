"""Syncs of one fragment of the model at a time, which training need not wait for.

Streaming DiLoCo, arXiv 2501.18512. With a delay, a fragment is frozen at its step (`Snapshot`), syncs in the background
in process groups of its own, and lands `delay_steps` later; `core/reference_streaming.py` says what it lands as. One at
most is in flight, and all ranks launch and land it at the ends of the same attempted steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from lordo_ds.comm.ledger import ByteLedger
from lordo_ds.config import LordoConfig
from lordo_ds.core.schedule import SyncPlan
from lordo_ds.errors import ConfigError
from lordo_ds.replica.bases import Bases
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.republish import republish_
from lordo_ds.sync.background import Background, BackgroundGroups
from lordo_ds.sync.faults import return_to_anchor_
from lordo_ds.sync.part import Arrival, Departure, PartSync
from lordo_ds.sync.snapshot import Snapshot


@dataclass
class Flight:
    """A sync that was launched. It lands at the end of attempted step `lands`."""

    departure: Departure
    part: PartSync
    snapshots: Sequence[Snapshot]
    lands: int


class Streaming:
    """The fragments of the model, and the one that is in flight.

    Args:
        parts: the sync of each fragment, of the parameters themselves, in the groups of training.
        groups: for what syncs beside training; needed with a delay.
    """

    def __init__(self, config: LordoConfig, parts: Sequence[PartSync], groups: BackgroundGroups | None) -> None:
        self.config, self.parts, self.delay_steps = config, parts, config.streaming.delay_steps
        self.flight: Flight | None = None
        self._beside: list[tuple[PartSync, list[Snapshot]]] = []
        if self.delay_steps:
            if groups is None:
                raise ConfigError(
                    f"LoRDO: {config.key('streaming')}.delay_steps = {self.delay_steps} needs process groups of its "
                    "own: give LoRDO.attach its `background`, or set 0"
                )
            self._background = Background[Arrival](groups.inside.device)
            self._beside = [self._of_snapshots(part, groups) for part in parts]

    def _of_snapshots(self, part: PartSync, groups: BackgroundGroups) -> tuple[PartSync, list[Snapshot]]:
        """The same sync, of snapshots and in other groups."""
        buckets = [[Snapshot(item, groups.inside) for item in bucket] for bucket in part.buckets]
        snapshots = [snapshot for bucket in buckets for snapshot in bucket]
        bases = Bases(self.config, snapshots, groups.inside, part.bases.each_replica_its_own)
        shared = part.faults, part.group_values
        beside = PartSync(self.config, buckets, groups.wire, groups.inside, bases, groups.tied, *shared)
        return beside, snapshots

    @property
    def all_parts(self) -> list[PartSync]:
        """Those of the parameters, and those of their snapshots."""
        return [*self.parts, *(part for part, _ in self._beside)]

    # -- in flight -----------------------------------------------------------------------------------

    def launch(self, plan: SyncPlan, departure: Departure) -> None:
        """Freeze the fragment that is due, and let it sync beside training. Nothing is communicated here."""
        assert self.flight is None and plan.fragment is not None
        (part, snapshots), began = self._beside[plan.fragment], time.perf_counter()
        for snapshot in snapshots:
            snapshot.take()
        self.flight = Flight(departure, part, snapshots, departure.report.step + self.delay_steps)

        def job() -> Arrival:
            arrival = part.run(plan, departure)
            for snapshot in snapshots:
                snapshot.measure_turn()
            departure.report.seconds = time.perf_counter() - began
            return arrival

        self._background.start(job)

    @property
    def fragment_in_flight(self) -> int | None:
        return None if self.flight is None else self.flight.departure.report.fragment

    def lands_at(self, step: int) -> bool:
        return self.flight is not None and self.flight.lands <= step

    @property
    def thread(self) -> int | None:
        """The identifier of the thread that syncs beside training."""
        return None if self.flight is None else self._background.thread

    def wait(self) -> None:
        """Until the sync in flight has ended, well or not."""
        if self.flight is not None:
            began = time.perf_counter()
            self._background.wait()
            self.flight.departure.report.seconds_blocked += time.perf_counter() - began

    def land_(self) -> tuple[Departure, Arrival]:
        """Take over what the sync in flight made, when it has ended. Collective over the shards.

        Raises:
            SyncError: what the sync found, on all ranks.
        """
        self.wait()
        flight, self.flight = self.flight, None
        assert flight is not None and flight.departure.report.fragment is not None
        here, there = self.parts[flight.departure.report.fragment], flight.part
        arrival = self._background.result()
        arrival.report.bytes_sent = there.wire.ledger.total_bytes
        for one, other in zip(_ledgers(here), _ledgers(there), strict=True):
            one.take_over(other)
        for snapshot in flight.snapshots:
            if here.wire.index in arrival.participants:
                snapshot.land_()
            else:
                snapshot.replace_()
        republish_(here.items, here.inside.shard)
        return flight.departure, arrival

    def give_up_weights(self, items: Sequence[Fragment]) -> None:
        """These were given other weights: what is in flight of them must not touch their anchors, nor be added."""
        if self.flight is None:
            return
        self.wait()
        given = {id(item) for item in items}
        for snapshot in self.flight.snapshots:
            snapshot.loaded |= id(snapshot.item) in given

    # -- what a sync of one fragment means for the others ----------------------------------------------

    def replace_rest_(self, fragment: int | None, participants: list[int]) -> None:
        """A replica that was left out cannot go on from its other fragments either. Collective over replicas then."""
        for f, part in enumerate(self.parts):
            if fragment in (None, f):
                continue
            if participants:
                part.faults.reseed_between_syncs_(part.items, participants, part.wire, part.inside)
            else:
                return_to_anchor_(part.items)


def _ledgers(part: PartSync) -> list[ByteLedger]:
    """Of all groups that a sync communicates in, in one order."""
    inside = part.inside
    comms = [part.wire, part.wire.twins, inside.shard, inside.tensor, inside.everyone, inside.rows]
    return [comm.ledger for comm in [*comms, *(weight.comm for _, weight in part.tied_copies.pairs)]]
