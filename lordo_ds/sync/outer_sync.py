"""The outer sync: the one object through which anything crosses replicas."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from lordo_ds.comm.checksum import checksum
from lordo_ds.comm.comm import Comm
from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import balanced_order, bucket_bounds
from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.core.ownership import at_owners
from lordo_ds.core.schedule import SyncPlan, sync_plan
from lordo_ds.costs import Links, needs_anchor, ownership, sync_bytes
from lordo_ds.replica.bases import Bases
from lordo_ds.replica.copies import TensorCopies, TiedCopies, TiedWeight
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.outside_changes import OutsideChanges
from lordo_ds.sync.bucket import BucketSync
from lordo_ds.sync.equality import Equality
from lordo_ds.sync.faults import Condition, Faults
from lordo_ds.sync.first_basis import first_bases_
from lordo_ds.sync.group_values import GroupValues
from lordo_ds.sync.header import Header, Trailer
from lordo_ds.sync.members import Members
from lordo_ds.sync.report import RowAverager, SyncReport
from lordo_ds.sync.rounds import Round, Shares
from lordo_ds.sync.throttle import throttle, warn_of_throttle
from lordo_ds.sync.traffic import REPLICAS, Counted, Traffic, counted_by_axis, ledgers_inside

logger = logging.getLogger("lordo_ds")

DEFAULT_BUCKET_NUMEL = 1 << 24  # elements of a shard reduced in one message; bounds the workspace of a sync


class OuterSync:
    """Averages the replicas' pseudo-gradients, steps the outer optimizer and refreshes the bases.

    Source: LoRDO, arXiv 2602.04396; outer optimizer as DiLoCo, arXiv 2311.08105; separate intervals for the
    moments as DES-LOC, arXiv 2505.22549. The items are in the same order on every replica.
    """

    def __init__(
        self,
        config: LordoConfig,
        items: Sequence[Fragment],
        wire: ReplicaWire,
        inside: InsideReplica,
        tied: Sequence[TiedWeight] = (),
        bucket_numel: int = DEFAULT_BUCKET_NUMEL,
    ) -> None:
        self.config, self.items, self.wire, self.inside = config, list(items), wire, inside
        self.members = Members()
        self.bases = Bases(config, items, inside, self._each_replica_its_own())
        self.faults = Faults(config, items, wire, inside)
        self.outside = OutsideChanges(items, wire, inside)
        self.group_values = GroupValues(items, inside)
        self.bucket_sync = BucketSync(config, self.bases, inside)
        self.equality = Equality(items, self.bases, inside)
        self.tensor_copies, self.tied_copies = TensorCopies(items, inside.tensor), TiedCopies(items, tied)
        order = [self.items[i] for i in balanced_order([item.intervals for item in self.items])]
        whole = [item.plan.numel for item in order if item.plan.low_rank and config.outer.orthogonalize]
        # Enough for every shard: a matrix to work on, or its part of the message.
        bound = inside.shard.size * max([bucket_numel, *whole])
        bounds = bucket_bounds([item.plan.numel for item in order], bound)
        self.buckets = [order[a:b] for a, b in bounds]
        self.syncs = 0
        self.nonfinite_syncs = 0
        self.left_out_syncs = 0
        self.last_synced_step = 0
        self.last_report: SyncReport | None = None
        self.rows = RowAverager()
        self.traffic = Traffic()
        throttle(config, wire)

    # -- the replicas --------------------------------------------------------------------------------

    def use_wire(self, wire: ReplicaWire, members: Members) -> None:
        """From now on, before the first step, the replicas meet on this wire, and these members say who is there.

        Anchors are made that one replica of its own does without.
        """
        self.wire, self.members = wire, members
        throttle(self.config, wire)
        self.bases.each_replica_its_own = self._each_replica_its_own()
        self.faults.use_wire(wire, members)
        for item in self.items:
            if "anchor" not in item.state and self.needs_anchor(item.plan):
                item.state["anchor"] = self._place(item.weight)
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
                item.state["anchor"] = self._place(item.weight)
        self.share_out()
        if not all(equal):
            logger.warning("LoRDO: the replicas %s different weights; all now have those of replica 0", came_by)

    def share_out(self) -> None:
        """Which elements this replica owns, and room for what is kept of them, and of what a lossy wire does not say.

        Zero where it is new.
        """
        owners = at_owners(self.config, self.wire.replicas, self.members.changing)
        self.bucket_sync.work_at_owners = self.bases.at_owners = owners
        lossy, block = self.bucket_sync.codec.lossy and not self._alone, self.bucket_sync.codec.block
        for bucket in self.buckets if owners or lossy else ():
            items = [item for item in bucket if "anchor" in item.state]
            owned = dict.fromkeys(range(len(items)), (0, 0))
            for one in ownership([item.holding for item in items], self.wire.replicas, owners, block)[self.wire.index]:
                owned[one.item] = one.start, one.stop
            for item, (start, stop) in zip(items, owned.values(), strict=True):
                anew = item.owned != (start, stop)
                item.owned = start, stop
                if lossy and "wire_error" not in item.state:
                    item.state["wire_error"] = self._zeros(item.weight)
                for name, wanted in (("owner_error", lossy), ("owner_momentum", owners and self._has_momentum)):
                    if wanted and (anew or name not in item.state):
                        item.state[name] = self._zeros(item.weight[start:stop])
        for item in self.items if self._has_momentum else ():
            if owners:
                item.state.pop("outer_momentum", None)
            elif "outer_momentum" not in item.state:
                item.state["outer_momentum"] = self._zeros(item.weight)

    @property
    def _has_momentum(self) -> bool:
        return not self.config.outer.is_plain_average

    def _zeros(self, like: Tensor) -> Tensor:
        return self._place(torch.zeros_like(like), torch.float32)

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

    def _place(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of the tensor where `anchor` says; by default pinned host memory for CUDA tensors."""
        device = self.config.anchor.device or ("cpu" if tensor.is_cuda else "same")
        if tensor.dtype == torch.float64:
            dtype = torch.float64
        elif dtype is None:
            dtype = torch.bfloat16 if self.config.anchor.dtype == "bf16" else torch.float32
        if device == "same" or not tensor.is_cuda:
            return tensor.detach().to(dtype, copy=True)
        host = torch.empty(tensor.shape, dtype=dtype, pin_memory=True)
        return host.copy_(tensor.detach())

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
        """The sync at the end of attempted step `step`. Collective over all replicas.

        Order: pseudo-gradient from the raw weights; weights and anchor; moments; basis from the raw
        pseudo-gradient; moments in the new basis; checksum.

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
        report = self.last_report = SyncReport(step, self.wire.replicas, 0)
        headers, steps, fit = self._exchange_headers(report, executed_steps, executed_now)
        participants = self.faults.participants(fit, report)
        report.participants = len(participants)
        self.rows.reduce(self.wire, self.inside, torch.tensor([(one.rows, one.row_length) for one in headers]))
        common_executed = max(one.executed_steps for one in headers)
        shares = Shares()
        if participants:
            self.nonfinite_syncs = 0
            self.left_out_syncs += len(participants) < self.wire.replicas
            gives_gradient = [m for m in participants if headers[m].executed_now]
            who = Round(plan, step, participants, gives_gradient, self.wire.index)
            self._sync_participants(report, who, steps, shares)
        else:
            self.nonfinite_syncs += 1
            self.faults.return_to_anchor_(report, sum(fit), self.nonfinite_syncs)
        self.syncs += 1
        self.last_synced_step = step
        self.equality.finish(plan, report, shares, self.wire)
        report.seconds = time.perf_counter() - began
        report.seconds_blocked = ledger.total_seconds - blocked_before
        report.bytes_sent = ledger.total_bytes - sent_before
        return common_executed

    def _exchange_headers(
        self, report: SyncReport, executed_steps: int, executed_now: bool
    ) -> tuple[list[Header], Tensor, list[bool]]:
        """What every replica tells of itself; with t of every item, (replicas, items), and who is fit to take part."""
        step = report.step
        # One replica that keeps no anchor has nothing to return to: like AdamW, it goes on.
        can_return = self.wire.replicas > 1 or not self.config.outer.is_plain_average
        condition = self.faults.condition(self.group_values.digest()) if can_return else Condition()
        rows, row_length = self.rows.shape
        basis_checksum = self.equality.of_bases()
        loaded, load_fault = self.outside.header_fields()
        mine = Header(
            step=step,
            rows=rows,
            row_length=row_length,
            finite=condition.finite,
            executed_steps=executed_steps,
            executed_now=executed_now,
            basis_checksum=basis_checksum,
            groups=condition.groups,
            loaded=loaded,
            load_fault=load_fault,
            sizes=condition.sizes,
        )
        in_order = [item.step for bucket in self.buckets for item in bucket]
        headers, steps = mine.exchange(self.wire, self.inside, "header", in_order)
        self.wire.assert_same("step", torch.tensor([one.step for one in headers]))
        if self.wire.steps_alike:
            self.wire.assert_same("recorded rows", torch.tensor([one.rows for one in headers]))
        executed = [one.executed_steps for one in headers]
        finite, sizes = [one.finite for one in headers], [one.sizes for one in headers]
        fit = self.faults.fit(finite, sizes, executed, [bool(one.loaded) for one in headers], report)
        self.outside.check_header(torch.tensor([(one.loaded, one.load_fault) for one in headers]), fit, step)
        self.group_values.compare(self.wire, headers, fit, step)
        self.equality.require_bases(headers, self.wire, step)
        return headers, steps, fit

    def _sync_participants(self, report: SyncReport, who: Round, steps: Tensor, shares: Shares) -> None:
        """Collective over all replicas, those that are left out too."""
        of_buckets = steps.split([len(bucket) for bucket in self.buckets], dim=1)
        for bucket, bucket_steps in zip(self.buckets, of_buckets, strict=True):
            self.bucket_sync.run_(bucket, bucket_steps, who, self.wire, shares)
            if self.wire.replicas > 1:
                self.tensor_copies.republish_(bucket)
        if self.wire.replicas > 1:
            self.tied_copies.republish_(moments=self.config.average_dense_moments)
        self.faults.reseed_(who.participants, report)

    def flush_rows(self) -> None:
        """Average the recorded rows now, apart from a sync. Collective."""
        shapes = None if self.wire.steps_alike else self.wire.gather(self.inside.vector([*self.rows.shape]), "header")
        self.rows.reduce(self.wire, self.inside, shapes)

    def end_step(self, step: int) -> None:
        """What was sent so far belongs to this attempted step and those before it."""
        self.traffic.end_step(step, synced=0 < step == self.last_synced_step, counted=self.counted())

    def counted(self) -> Counted:
        """What this rank has sent so far, and how long that blocked it, by axis: `replicas` and those inside one."""
        inside = ledgers_inside(self.wire, self.inside, self.tied_copies)
        return counted_by_axis({REPLICAS: [self.wire.ledger], **inside})

    def predicted_bytes(self, plan: SyncPlan, rows: int, row_length: int) -> int:
        """Bytes that this rank sends across replicas in an ordinary sync (all replicas take part)."""
        return sync_bytes(
            self.config,
            plan,
            [[item.holding for item in bucket] for bucket in self.buckets],
            Links(self.wire.replicas, self.wire.twins.size, self.wire.index, self.wire.twins.index),
            header_fields=Header.width(),
            trailer_fields=Trailer.width(),
            row_numbers=rows * (row_length + 1),
        )
