"""The outer sync: the one object through which anything crosses replicas."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lordo_ds.comm.checksum import checksum
from lordo_ds.comm.comm import Comm
from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import balanced_order, bucket_bounds
from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.core.outer import pseudo_gradient
from lordo_ds.core.schedule import SyncPlan
from lordo_ds.costs import Links, needs_anchor, sync_bytes
from lordo_ds.errors import SyncError
from lordo_ds.replica.bases import Bases
from lordo_ds.replica.copies import TensorCopies, TiedCopies, TiedWeight
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.outside_changes import OutsideChanges
from lordo_ds.sync.faults import Condition, Faults
from lordo_ds.sync.group_values import GroupValues
from lordo_ds.sync.moments import common_moments_, republish_
from lordo_ds.sync.outer_step import OuterStep
from lordo_ds.sync.outliers import SIZES
from lordo_ds.sync.report import RowAverager, SyncReport

logger = logging.getLogger("lordo_ds")

DEFAULT_BUCKET_NUMEL = 1 << 24  # elements of a shard reduced in one message; bounds the workspace of a sync
# step, rows, their length, finite, executed steps, executed now, basis checksum, digest of the groups, outside changes
# (two fields), sizes
_HEADER_FIELDS = 10 + len(SIZES)
_TRAILER_FIELDS = 4  # checksum, |D_m|^2, energy inside the basis, energy


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
        self.bases = Bases(config, items, wire, inside)
        self.faults = Faults(config, items, wire, inside)
        self.outside = OutsideChanges(items, wire, inside)
        self.group_values = GroupValues(items, inside)
        self.outer_step = OuterStep(config, inside)
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

    # -- start ---------------------------------------------------------------------------------------

    def start(self, resuming: bool = False) -> bool:
        """Make the weights equal to those of replica 0 and set the anchors; True if they were equal before.

        Args:
            resuming: a saved state comes next, and with it the anchors; every replica keeps the weights that it has.
        """
        # Those of one replica first: only equal ones may divide what crosses replicas.
        equal = [self._equalise(group) for group in (self.wire.twins, self.wire) if not resuming]
        if not self.tensor_copies.start_():
            logger.warning("LoRDO: tensor-parallel ranks started with different copies; all now have the first one's")
        self.tied_copies.republish_(moments=False)
        for item in self.items:
            if self.needs_anchor(item.plan):
                item.state["anchor"] = self._place(item.weight)
            if not self.config.outer.is_plain_average:
                item.state["outer_momentum"] = self._place(torch.zeros_like(item.weight), torch.float32)
        return all(equal)

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
        return needs_anchor(self.config, plan.low_rank, alone=self.wire.replicas == 1)

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
        began, sent_before = time.perf_counter(), self.wire.ledger.total_bytes
        report = self.last_report = SyncReport(step, self.wire.replicas, 0)
        header, fit = self._exchange_header(report, executed_steps, executed_now)
        participants = self.faults.participants(fit, report)
        report.participants = len(participants)
        self.rows.reduce(self.wire, self.inside, header[:, 1:3])
        common_executed = int(header[:, 4].max())
        if participants:
            self.nonfinite_syncs = 0
            self.left_out_syncs += len(participants) < self.wire.replicas
            shares: tuple[float, ...] = self._sync_participants(plan, report, header, participants)
        else:
            shares = (0.0, 0.0, 0.0, 0.0)
            self.nonfinite_syncs += 1
            self.faults.return_to_anchor_(report, sum(fit), self.nonfinite_syncs)
        self.syncs += 1
        self.last_synced_step = step
        self._finish(plan, report, shares)
        report.seconds = time.perf_counter() - began
        report.bytes_sent = self.wire.ledger.total_bytes - sent_before
        return common_executed

    def _exchange_header(
        self, report: SyncReport, executed_steps: int, executed_now: bool
    ) -> tuple[Tensor, list[bool]]:
        """What every replica tells of itself; and which of them are finite and near the others."""
        step = report.step
        # One replica that keeps no anchor has nothing to return to: like AdamW, it goes on.
        can_return = self.wire.replicas > 1 or not self.config.outer.is_plain_average
        condition = self.faults.condition(self.group_values.digest()) if can_return else Condition()
        shared_bases = [] if self.bases.each_replica_its_own else [i.basis for i in self.items if i.plan.low_rank]
        fields = [step, *self.rows.shape, int(condition.finite), executed_steps, int(executed_now)]
        fields += [checksum(shared_bases), condition.groups, *self.outside.header_fields()]
        fields += torch.tensor(condition.sizes, dtype=torch.float64).view(torch.int64).tolist()
        assert len(fields) == _HEADER_FIELDS
        header = self.wire.gather(
            self.inside.vector(fields + [item.step for bucket in self.buckets for item in bucket]), "header"
        ).cpu()
        self.wire.assert_same("step", header[:, 0])
        if self.wire.steps_alike:
            self.wire.assert_same("recorded rows", header[:, 1])
        sizes = header[:, 10:_HEADER_FIELDS].contiguous().view(torch.float64).tolist()
        fit = self.faults.fit(header[:, 3].bool().tolist(), sizes, header[:, 4].tolist(), report)
        self.outside.check_header(header[:, 8:10], fit, step)
        self.group_values.compare(self.wire, header[:, [4, 5, 7]], fit, step)
        if not bool((header[:, 6] == header[0, 6]).all()):
            raise SyncError(
                f"LoRDO: the replicas' bases differ before the sync at step {step}: {self._culprit('basis')}"
            )
        return header, fit

    def _sync_participants(
        self, plan: SyncPlan, report: SyncReport, header: Tensor, participants: list[int]
    ) -> tuple[float, ...]:
        """Returns this rank's share of what the report adds up: see `_finish`."""
        takes_part = self.wire.index in participants
        gives_gradient = [m for m in participants if header[m, 5]]
        own_norm, mean_norm, overlaps = 0.0, 0.0, [0.0, 0.0]
        position = _HEADER_FIELDS
        for bucket in self.buckets:
            steps = header[:, position : position + len(bucket)]
            position += len(bucket)
            anchored = [item for item in bucket if "anchor" in item.state]
            means, own = self._mean_pseudo_gradients(anchored, participants, takes_part)
            own_norm += own
            mean_norm += sum(float(m.square().sum()) for i, m in zip(anchored, means, strict=True) if i.counts)
            self.outer_step.run_(anchored, means, plan, self.wire.replicas)
            common_moments_(bucket, steps, participants, takes_part, plan, self.config, self.wire)
            by_item = {id(item): mean for item, mean in zip(anchored, means, strict=True)}
            for item in bucket if plan.refresh_basis else ():
                matrix = self._basis_matrix(item, by_item, gives_gradient, takes_part)
                if matrix is None:
                    continue
                overlap = self.bases.refresh(item, matrix, report.step)
                if overlap is not None and self.inside.tensor.index == 0:
                    overlaps = [overlaps[0] + overlap, overlaps[1] + 1.0]
            republish_(bucket, self.inside.shard)
            if self.wire.replicas > 1:
                self.tensor_copies.republish_(bucket)
        if self.wire.replicas > 1:
            self.tied_copies.republish_(moments=self.config.average_dense_moments)
        self.faults.reseed_(participants, report)
        return own_norm, mean_norm, *overlaps

    def _mean_pseudo_gradients(
        self, items: list[Fragment], participants: list[int], takes_part: bool
    ) -> tuple[list[Tensor], float]:
        """D of each item, averaged over the participants; and the squared norm of this replica's own."""
        if not items:
            return [], 0.0
        flat = items[0].weight.new_zeros(sum(item.numel for item in items))
        parts = list(flat.split([item.numel for item in items]))
        if takes_part:
            for item, part in zip(items, parts, strict=True):
                pseudo_gradient(item.state["anchor"], item.weight, out=part)
                if self.config.projection == "local":
                    item.own_pseudo_gradient = part.clone()
        own = sum(float(part.square().sum()) for item, part in zip(items, parts, strict=True) if item.counts)
        if self.wire.replicas > 1 and flat.numel():
            flat.div_(len(participants))
            if self.config.pseudo_gradient_dtype == "bf16":
                flat.copy_(self.wire.sum_(flat.to(torch.bfloat16), "pseudo_gradient"))
            else:
                self.wire.sum_(flat, "pseudo_gradient")
        return parts, own

    def _basis_matrix(
        self, item: Fragment, means: dict[int, Tensor], gives_gradient: list[int], takes_part: bool
    ) -> Tensor | None:
        """What the basis of this item is refreshed from at a sync; None where a sync does not refresh it."""
        if not item.plan.low_rank or not item.has_basis:
            return None
        if self.config.basis_source != "gradient":
            if self.config.projection == "local" and self.wire.replicas > 1:
                return item.own_pseudo_gradient
            return means[id(item)]
        if self.bases.each_replica_its_own:
            return None  # refreshed inside the due step already
        matrix = torch.zeros_like(item.weight)
        if self.wire.index in gives_gradient and item.gradient is not None:
            matrix.copy_(item.gradient)
        return self.wire.sum_(matrix, "gradient").div_(max(1, len(gives_gradient)))

    def _finish(self, plan: SyncPlan, report: SyncReport, shares: tuple[float, ...]) -> None:
        """Prove that the replicas are equal, and average what the report says of them.

        Args:
            shares: this rank's share of |D_m|^2, |D|^2, the sum of overlaps, and how many they are.
        """
        report.basis_notes = self.bases.take_notes(report.step)
        sums = torch.tensor([*shares, *self._gradient_energies()], dtype=torch.float64, device=self.inside.device)
        own_norm, mean_norm, overlaps, refreshed, inside, energy = self.inside.everyone.sum_(sums, "report").tolist()
        report.overlap = overlaps / refreshed if refreshed else None
        for item in self.items:
            item.gradient = item.own_pseudo_gradient = None
        if self.wire.replicas > 1:
            numbers = torch.tensor([own_norm, inside, energy], dtype=torch.float64)
            trailer = torch.cat([torch.tensor([checksum(self._shared_tensors(plan))]), numbers.view(torch.int64)])
            assert trailer.numel() == _TRAILER_FIELDS
            rows = self.wire.gather(self.inside.vector(trailer.tolist()), "checksum").cpu()
            if not bool((rows[:, 0] == rows[0, 0]).all()):
                raise SyncError(
                    f"LoRDO: the replicas differ after the sync at step {report.step}: {self._culprit('all', plan)}"
                )
            totals = rows[:, 1:].contiguous().view(torch.float64).sum(0)
            mean_own = float(totals[0]) / max(1, report.participants)
            # Mean squared distance from the mean, by the variance identity.
            report.drift = (max(0.0, mean_own - mean_norm) / mean_norm) ** 0.5 if mean_norm > 0 else 0.0
            inside, energy = float(totals[1]), float(totals[2])
        report.captured_gradient_energy = inside / energy if energy > 0 else None

    def _gradient_energies(self) -> tuple[float, float]:
        inside = energy = 0.0
        for item in self.items:
            measured, item.energies = item.energies, None
            if item.counts and measured is not None and all(bool(torch.isfinite(value)) for value in measured):
                inside, energy = inside + float(measured[0]), energy + float(measured[1])
        return inside, energy

    def _shared_tensors(self, plan: SyncPlan, item: Fragment | None = None) -> Iterator[Tensor]:
        """Everything that must be bitwise equal on all replicas after a sync."""
        for one in self.items if item is None else [item]:
            yield one.weight
            if "outer_momentum" in one.state:
                yield one.state["outer_momentum"]
            if one.plan.low_rank and not self.bases.each_replica_its_own:
                yield one.basis
                if plan.average_exp_avg:
                    yield one.state["exp_avg"]
                # Re-expressing v mixes in u: with a u of its own on each replica it differs by right.
                if plan.average_exp_avg_sq and (plan.average_exp_avg or not plan.refresh_basis):
                    yield one.state["exp_avg_sq"]

    def _culprit(self, what: str, plan: SyncPlan | None = None) -> str:
        """Name the first parameter whose tensors differ between replicas. Collective."""
        sums = []
        for item in self.items:
            if what == "basis" or plan is None:
                sums.append(checksum([item.basis] if item.plan.low_rank else []))
            else:
                sums.append(checksum(self._shared_tensors(plan, item)))
        rows = self.wire.gather(self.inside.vector(sums), "checksum").cpu()
        for column, item in enumerate(self.items):
            odd = [m for m in range(self.wire.replicas) if rows[m, column] != rows[0, column]]
            if odd:
                return f"{item.plan.name} on replicas {odd} against replica 0"
        return "no single parameter"

    def flush_rows(self) -> None:
        """Average the recorded rows now, apart from a sync. Collective."""
        shapes = None if self.wire.steps_alike else self.wire.gather(self.inside.vector([*self.rows.shape]), "header")
        self.rows.reduce(self.wire, self.inside, shapes)

    def predicted_bytes(self, plan: SyncPlan, rows: int, row_length: int) -> int:
        """Bytes that this rank sends across replicas in an ordinary sync (all replicas take part)."""
        return sync_bytes(
            self.config,
            plan,
            [[item.holding for item in bucket] for bucket in self.buckets],
            Links(self.wire.replicas, self.wire.twins.size),
            header_fields=_HEADER_FIELDS,
            trailer_fields=_TRAILER_FIELDS,
            row_numbers=rows * (row_length + 1),
        )
