"""The outer sync: the one object through which anything crosses replicas."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from lordo_ds.comm.checksum import checksum
from lordo_ds.comm.comm import Comm
from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.codec import codec_of
from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.core.ownership import at_owners
from lordo_ds.core.schedule import SyncPlan, sync_plan
from lordo_ds.costs import Links, needs_anchor, sync_bytes
from lordo_ds.errors import ConfigError
from lordo_ds.replica.bases import Bases
from lordo_ds.replica.copies import TiedWeight
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.outside_changes import OutsideChanges
from lordo_ds.replica.placed import placed
from lordo_ds.sync.background import BackgroundGroups
from lordo_ds.sync.faults import Faults
from lordo_ds.sync.first_basis import first_bases_
from lordo_ds.sync.group_values import GroupValues
from lordo_ds.sync.header import Header, Trailer
from lordo_ds.sync.members import Members
from lordo_ds.sync.owned_state import share_out_
from lordo_ds.sync.part import Arrival, Departure, PartSync, buckets_of
from lordo_ds.sync.report import RowAverager, SyncReport
from lordo_ds.sync.streaming import Streaming
from lordo_ds.sync.throttle import throttle, warn_of_throttle
from lordo_ds.sync.traffic import REPLICAS, Counted, Traffic, counted_by_axis, ledgers_inside

logger = logging.getLogger("lordo_ds")

DEFAULT_BUCKET_NUMEL = 1 << 24  # elements of a shard reduced in one message; bounds the workspace of a sync


class OuterSync:
    """Averages the replicas' pseudo-gradients, steps the outer optimizer and refreshes the bases.

    Source: LoRDO, arXiv 2602.04396; outer optimizer as DiLoCo, arXiv 2311.08105; separate intervals for the
    moments as DES-LOC, arXiv 2505.22549. The items are in the same order on every replica.

    Args:
        fragment_of: with streaming, the fragment of the model that each parameter is in.
        background: with a delay, the groups for what syncs beside training.
    """

    def __init__(
        self,
        config: LordoConfig,
        items: Sequence[Fragment],
        wire: ReplicaWire,
        inside: InsideReplica,
        tied: Sequence[TiedWeight] = (),
        fragment_of: Mapping[str, int] = MappingProxyType({}),
        background: BackgroundGroups | None = None,
        bucket_numel: int = DEFAULT_BUCKET_NUMEL,
    ) -> None:
        self.config, self.items, self.wire, self.inside = config, list(items), wire, inside
        self.members = Members()
        self.bases = Bases(config, items, inside, self._each_replica_its_own())
        self.faults = Faults(config, items, wire)
        self.outside = OutsideChanges(items, wire, inside)
        shared = self.faults, GroupValues(items)
        groups = [
            [item for item in items if fragment_of.get(item.plan.name, 0) == f]
            for f in range(config.streaming.fragments)
        ]
        # No bucket spans fragments, so that who owns which elements is the same in a sync of everything.
        fragments = [buckets_of(config, group, inside, bucket_numel) for group in groups]
        self.buckets = [bucket for buckets in fragments for bucket in buckets]
        self.whole = PartSync(config, self.buckets, wire, inside, self.bases, tied, *shared)
        self.tensor_copies, self.tied_copies = self.whole.tensor_copies, self.whole.tied_copies
        parts = [PartSync(config, buckets, wire, inside, self.bases, tied, *shared) for buckets in fragments]
        self.streaming = Streaming(config, parts, background)
        self.outside.before_load = self.streaming.give_up_weights
        self.syncs = 0
        self.nonfinite_syncs = 0
        self.left_out_syncs = 0
        self.last_synced_step = 0  # the last step that ended in a sync of everything: then all replicas were equal
        self.landed_step = 0  # the last step that a sync, of everything or of a fragment, ended at
        self.last_report: SyncReport | None = None
        self.rows = RowAverager()
        self.traffic = Traffic()
        throttle(config, wire)

    # -- the replicas --------------------------------------------------------------------------------

    def use_wire(self, wire: ReplicaWire, members: Members) -> None:
        """From now on, before the first step, the replicas meet on this wire, and these members say who is there.

        Anchors are made that one replica of its own does without.
        """
        self.wire, self.whole.wire, self.members = wire, wire, members
        throttle(self.config, wire)
        self.bases.each_replica_its_own = self._each_replica_its_own()
        self.faults.use_wire(wire, members)
        for item in self.items:
            if "anchor" not in item.state and self.needs_anchor(item.plan):
                item.state["anchor"] = placed(item.weight, self.config.anchor)
        self.share_out()

    @property
    def _alone(self) -> bool:
        """This is the only replica, for good."""
        return self.wire.replicas == 1 and not self.members.changing

    def _each_replica_its_own(self) -> bool:
        return self._alone or self.config.projection == "local"

    # -- start ---------------------------------------------------------------------------------------

    def start(self, resuming: bool = False, came_by: str = "started from") -> None:
        """Make the weights equal to those of replica 0, say so where they were not, and set the anchors. Collective.

        Args:
            came_by: how the replicas came by their weights, for the message.
            resuming: a saved state comes next, and with it the anchors; every replica keeps the weights that it has.
        """
        assert self.streaming.flight is None
        if self.inside.everyone.index == 0:
            ordinary = sync_plan(self.config, self.config.sync_interval)
            warn_of_throttle(self.config, self.wire, self.predicted_bytes(ordinary, rows=0, row_length=0))
        # Those of one replica first: only equal ones may divide what crosses replicas.
        equal = [self._equalise(group) for group in (self.wire.twins, self.wire) if not resuming]
        if not self.tensor_copies.start_():
            logger.warning("LoRDO: tensor-parallel ranks started with different copies; all now have the first one's")
        self.tied_copies.republish_(moments=False)
        for item in self.items:
            if self.needs_anchor(item.plan):
                item.state["anchor"] = placed(item.weight, self.config.anchor)
        self.share_out()
        if not all(equal):
            logger.warning("LoRDO: the replicas %s different weights; all now have those of replica 0", came_by)

    def share_out(self) -> None:
        """Where the work of a sync is done, which elements this replica owns, and room for what is kept of them."""
        owners = at_owners(self.config, self.wire.replicas, self.members.changing)
        for part in (self.whole, *self.streaming.all_parts):
            part.bucket_sync.work_at_owners = part.bases.at_owners = owners
        lossy = codec_of(self.config.pseudo_gradient_dtype).lossy and not self._alone
        share_out_(self.config, self.buckets, self.wire, owners, lossy)

    def _equalise(self, group: Comm) -> bool:
        """Give all ranks of the group the weights of the first; whether they were equal before."""
        if group.size == 1:
            return True
        sums = group.gather(self.inside.vector([checksum(item.weight for item in self.items)]), "start")
        equal = bool((sums == sums[0]).all())
        for item in self.items if not equal else ():
            group.broadcast_(item.weight, "start")
        return equal

    def needs_anchor(self, plan: ParameterPlan) -> bool:
        return needs_anchor(self.config, plan.low_rank, alone=self._alone)

    def check_copies(self, step: int) -> None:
        """Refuse to go on where copies of a parameter inside the replica have got different gradients. Collective."""
        self.tensor_copies.check_gradients(step)
        self.tied_copies.check_gradients(step)

    # -- the sync ------------------------------------------------------------------------------------

    def first_bases(self, step: int, executed_before: int, executed_now: bool) -> None:
        """At the end of a step that `Bases.wait_for_all_replicas` asks it of: see `first_bases_`. Collective."""
        first_bases_(self.bases, self.wire, step, executed_before, executed_now)

    @torch.no_grad()
    def run(self, plan: SyncPlan, step: int, executed_steps: int, executed_now: bool) -> int:
        """The sync at the end of attempted step `step`. Collective over all replicas; see `PartSync.run`.

        Args:
            executed_steps: steps that this replica executed so far (fp16 overflows are not executed).
            executed_now: whether it executed the one that just ended.

        Returns:
            The executed steps of the replica that executed most, left out or not; every replica takes it over, so
            that learning rates go on alike and never back.

        Raises:
            SyncError: the replicas differ where they must not, or too few were finite too many times in a row.
        """
        ledger = self.wire.ledger
        began, sent_before, blocked_before = time.perf_counter(), ledger.total_bytes, ledger.total_seconds
        part = self.whole if plan.fragment is None else self.streaming.parts[plan.fragment]
        departure = self._depart(plan, step, executed_steps, executed_now, self.rows)
        arrival = part.run(plan, departure)
        self.outside.start_anew()
        self.streaming.replace_rest_(plan.fragment, arrival.participants)
        report = arrival.report
        report.seconds = time.perf_counter() - began
        report.seconds_blocked = ledger.total_seconds - blocked_before
        report.bytes_sent = ledger.total_bytes - sent_before
        self._count(arrival, step)
        if plan.fragment is None:
            self.last_synced_step = step
        return arrival.common_executed

    @torch.no_grad()
    def launch(self, plan: SyncPlan, step: int, executed_steps: int, executed_now: bool) -> None:
        """Begin the sync of a fragment beside training, with all that it needs as it is now. `land` ends it.

        Collective inside the replica.
        """
        departure = self._depart(plan, step, executed_steps, executed_now, self.rows.depart())
        self.outside.start_anew()
        self.streaming.launch(plan, departure)

    def refuse_changed(self, step: int) -> None:
        """Refuse weights in the place of those of the last step, as in an evaluation: what lands is not for them.

        Raises:
            ConfigError: with what to do.
        """
        if not self.outside.unchanged():
            raise ConfigError(
                f"LoRDO: a sync is in flight, and the weights are not those that step {step} left: put them back first "
                f"(or set {self.config.key('streaming')}.delay_steps to 0)"
            )

    @torch.no_grad()
    def land(self, step: int) -> int:
        """End the sync that is in flight, at the end of attempted step `step`. Collective over all replicas.

        Returns:
            How many steps more than this replica had executed, when the sync began, the one that executed most had.

        Raises:
            SyncError: see `PartSync.run`.
        """
        departure, arrival = self.streaming.land_()
        self.rows.take_in(departure.rows)
        self.last_report = report = arrival.report
        ledger = self.wire.ledger
        ledger.add("landing", 0, report.seconds_blocked)  # that training has waited; what was sent, it did not
        sent_before, blocked_before = ledger.total_bytes, ledger.total_seconds
        self.streaming.replace_rest_(report.fragment, arrival.participants)
        report.bytes_sent += ledger.total_bytes - sent_before
        report.seconds_blocked += ledger.total_seconds - blocked_before
        self._count(arrival, step)
        return arrival.common_executed - departure.executed_steps

    def _depart(
        self, plan: SyncPlan, step: int, executed_steps: int, executed_now: bool, rows: RowAverager
    ) -> Departure:
        """What this rank says of itself now. Collective inside the replica."""
        # One replica that keeps no anchor has nothing to return to: like AdamW, it goes on.
        can_return = self.wire.replicas > 1 or not self.config.outer.is_plain_average
        condition = self.faults.own_condition(self.whole.group_values.digest()) if can_return else None
        loaded, load_fault = self.outside.header_fields()
        report = SyncReport(step, self.wire.replicas, 0, fragment=plan.fragment)
        for fragment, part in enumerate(self.streaming.parts):
            for item in part.items if plan.fragment not in (None, fragment) else ():
                item.waiting.take_energies()  # of a gradient that this sync does not measure
        if plan.fragment is None or not self.streaming.delay_steps:
            self.last_report = report
        return Departure(
            report=report,
            executed_steps=executed_steps,
            executed_now=executed_now,
            condition=condition,
            loaded=loaded,
            load_fault=load_fault,
            first_loaded=self.outside.first_loaded,
            rows=rows,
            nonfinite_syncs=self.nonfinite_syncs,
        )

    def _count(self, arrival: Arrival, step: int) -> None:
        self.syncs += 1
        self.landed_step = step
        if arrival.participants:
            self.nonfinite_syncs = 0
            self.left_out_syncs += len(arrival.participants) < self.wire.replicas
        else:
            self.nonfinite_syncs += 1

    def flush_rows(self) -> None:
        """Average the recorded rows now, apart from a sync. Collective."""
        shapes = None if self.wire.steps_alike else self.wire.gather(self.inside.vector([*self.rows.shape]), "header")
        self.rows.reduce(self.wire, self.inside, shapes)

    def end_step(self, step: int) -> None:
        """What was sent so far belongs to this attempted step and those before it."""
        self.traffic.end_step(step, synced=0 < step == self.landed_step, counted=self.counted())

    def counted(self) -> Counted:
        """What this rank has sent so far, and how long that blocked it, by axis: `replicas` and those inside one."""
        inside = ledgers_inside(self.wire, self.inside, self.tied_copies)
        return counted_by_axis({REPLICAS: [self.wire.ledger], **inside})

    def predicted_bytes(self, plan: SyncPlan, rows: int, row_length: int) -> int:
        """Bytes that this rank sends across replicas in an ordinary sync (all replicas take part)."""
        part = self.whole if plan.fragment is None else self.streaming.parts[plan.fragment]
        return sync_bytes(
            self.config,
            plan,
            [[item.holding for item in bucket] for bucket in part.buckets],
            Links(self.wire.replicas, self.wire.twins.size, self.wire.index, self.wire.twins.index),
            header_fields=Header.width(),
            trailer_fields=Trailer.width(),
            row_numbers=rows * (row_length + 1),
        )
