"""One sync of some of the parameters, all of them or a fragment of the model, in the groups that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import balanced_order, bucket_bounds
from lordo_ds.core.schedule import SyncPlan
from lordo_ds.replica.bases import Bases
from lordo_ds.replica.copies import TensorCopies, TiedCopies, TiedWeight
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.outside_changes import check_loads
from lordo_ds.sync.bucket import BucketSync
from lordo_ds.sync.equality import Equality
from lordo_ds.sync.faults import Condition, Faults, return_to_anchor_
from lordo_ds.sync.group_values import GroupValues
from lordo_ds.sync.header import Header, RankCondition
from lordo_ds.sync.report import RowAverager, SyncReport
from lordo_ds.sync.rounds import Round, Shares


@dataclass
class Departure:
    """What this rank says of itself as a sync begins, and what it gives it to take along.

    `condition` is None for one replica that keeps no anchor: it has nothing to return to. `loaded` and `load_fault` are
    of `OutsideChanges`, `nonfinite_syncs` how many syncs before this one ended with too few finite replicas in a row.
    """

    report: SyncReport
    executed_steps: int
    executed_now: bool
    condition: RankCondition | None
    loaded: int
    load_fault: int
    first_loaded: str
    rows: RowAverager
    nonfinite_syncs: int


@dataclass
class Arrival:
    """What a sync found: who took part, and the executed steps of the replica that executed most."""

    report: SyncReport
    participants: list[int]
    common_executed: int


class PartSync:
    """Averages of these parameters over the replicas, and proof that they end equal.

    Args:
        buckets: the parameters, those that travel in one message together.
        bases: of the matrices among them.
        tied: weights that other pipeline stages hold copies of, in this sync's groups.
        faults, group_values: of the whole replica.
    """

    def __init__(
        self,
        config: LordoConfig,
        buckets: Sequence[Sequence[Fragment]],
        wire: ReplicaWire,
        inside: InsideReplica,
        bases: Bases,
        tied: Sequence[TiedWeight],
        faults: Faults,
        group_values: GroupValues,
    ) -> None:
        self.config, self.buckets, self.wire, self.inside = config, buckets, wire, inside
        self.items = [item for bucket in buckets for item in bucket]
        self.bases, self.faults, self.group_values = bases, faults, group_values
        self.bucket_sync = BucketSync(config, bases, inside)
        self.equality = Equality(self.items, bases, inside)
        names = {item.plan.name for item in self.items}
        self.tensor_copies = TensorCopies(self.items, inside.tensor)
        self.tied_copies = TiedCopies(self.items, [weight for weight in tied if weight.name in names])

    def run(self, plan: SyncPlan, departure: Departure) -> Arrival:
        """Collective over all replicas.

        Order: pseudo-gradient from the raw weights; weights and anchor; moments; basis from the raw
        pseudo-gradient; moments in the new basis; checksum.

        Raises:
            SyncError: the replicas differ where they must not, or too few were finite too many times in a row.
        """
        # Also of a rank that holds nothing of this fragment, as a stage may.
        report, shares = departure.report, Shares(of_owned=self.bucket_sync.work_at_owners)
        headers, steps, fit = self._exchange_headers(departure)
        participants = self.faults.participants(fit, report)
        report.participants = len(participants)
        departure.rows.reduce(self.wire, self.inside, torch.tensor([(one.rows, one.row_length) for one in headers]))
        if participants:
            gives_gradient = [m for m in participants if headers[m].executed_now]
            who = Round(plan, report.step, participants, gives_gradient, self.wire.index)
            self._average_(who, steps, shares)
            self.faults.say_left_out(participants, report)
            self.faults.reseed_(self.items, participants, self.wire, self.inside)
        else:
            self.faults.refuse_too_few(report, sum(fit), departure.nonfinite_syncs + 1)
            return_to_anchor_(self.items)
        self.equality.finish(plan, report, shares, self.wire)
        return Arrival(report, participants, max(one.executed_steps for one in headers))

    def _exchange_headers(self, departure: Departure) -> tuple[list[Header], Tensor, list[bool]]:
        """What every replica tells of itself; with t of every item, (replicas, items), and who is fit to take part."""
        report, mine = departure.report, departure.condition
        condition = Condition() if mine is None else self.faults.condition(mine, self.inside)
        rows, row_length = departure.rows.shape
        header = Header(
            step=report.step,
            rows=rows,
            row_length=row_length,
            finite=condition.finite,
            executed_steps=departure.executed_steps,
            executed_now=departure.executed_now,
            basis_checksum=self.equality.of_bases(),
            groups=condition.groups,
            loaded=departure.loaded,
            load_fault=departure.load_fault,
            sizes=condition.sizes,
        )
        headers, steps = header.exchange(self.wire, self.inside, "header", [item.step for item in self.items])
        self.wire.assert_same("step", torch.tensor([one.step for one in headers]))
        if self.wire.steps_alike:
            self.wire.assert_same("recorded rows", torch.tensor([one.rows for one in headers]))
        executed = [one.executed_steps for one in headers]
        finite, sizes = [one.finite for one in headers], [one.sizes for one in headers]
        fit = self.faults.fit(finite, sizes, executed, [bool(one.loaded) for one in headers], report)
        loads = torch.tensor([(one.loaded, one.load_fault) for one in headers])
        check_loads(loads, fit, report.step, departure.first_loaded)
        self.group_values.compare(self.wire, self.inside, headers, fit, report.step)
        self.equality.require_bases(headers, self.wire, report.step)
        return headers, steps, fit

    def _average_(self, who: Round, steps: Tensor, shares: Shares) -> None:
        """Collective over all replicas, those that are left out too."""
        of_buckets = steps.split([len(bucket) for bucket in self.buckets], dim=1)
        for bucket, bucket_steps in zip(self.buckets, of_buckets, strict=True):
            self.bucket_sync.run_(bucket, bucket_steps, who, self.wire, shares)
            if self.wire.replicas > 1:
                self.tensor_copies.republish_(bucket)
        if self.wire.replicas > 1:
            self.tied_copies.republish_(moments=self.config.average_dense_moments)


def buckets_of(
    config: LordoConfig, items: Sequence[Fragment], inside: InsideReplica, bucket_numel: int
) -> list[list[Fragment]]:
    """What travels in one message together."""
    order = [items[i] for i in balanced_order([item.intervals for item in items])]
    whole = [item.plan.numel for item in order if item.plan.low_rank and config.outer.orthogonalize]
    # Enough for every shard: a matrix to work on, or its part of the message.
    bound = inside.shard.size * max([bucket_numel, *whole])
    return [order[a:b] for a, b in bucket_bounds([item.plan.numel for item in order], bound)]
