"""The end of a sync: proof that the replicas are equal, and what the report says of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lordo_ds.comm.checksum import checksum
from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.core.schedule import SyncPlan
from lordo_ds.errors import SyncError
from lordo_ds.replica.bases import Bases
from lordo_ds.replica.fragment import Fragment
from lordo_ds.sync.header import Header, Trailer
from lordo_ds.sync.report import SyncReport
from lordo_ds.sync.rounds import Shares


class Equality:
    """What must be equal on all replicas, compared by checksums; what is not is named, on all ranks at once."""

    def __init__(self, items: Sequence[Fragment], bases: Bases, inside: InsideReplica) -> None:
        self.items, self.bases, self.inside = list(items), bases, inside

    # -- before a sync -------------------------------------------------------------------------------

    def of_bases(self) -> int:
        """A checksum of the bases that replicas share."""
        own = self.bases.each_replica_its_own
        return checksum(item.basis for item in self.items if item.plan.low_rank and not own)

    def require_bases(self, headers: Sequence[Header], wire: ReplicaWire, step: int) -> None:
        if len({one.basis_checksum for one in headers}) > 1:
            sums = [checksum([item.basis] if item.plan.low_rank else []) for item in self.items]
            culprit = self._culprit(sums, wire)
            raise SyncError(f"LoRDO: the replicas' bases differ before the sync at step {step}: {culprit}")

    # -- after it ------------------------------------------------------------------------------------

    def finish(self, plan: SyncPlan, report: SyncReport, shares: Shares, wire: ReplicaWire) -> None:
        """Prove that the replicas are equal, and average what the report says of them. Collective."""
        report.basis_notes = self.bases.take_notes(report.step)
        of_rank = [shares.own_norm, shares.mean_norm, shares.overlaps, shares.refreshed, *self._gradient_energies()]
        sums = torch.tensor(of_rank, dtype=torch.float64, device=self.inside.device)
        own_norm, mean_norm, overlaps, refreshed, inside, energy = self.inside.everyone.sum_(sums, "report").tolist()
        for item in self.items:
            item.waiting.forget_gradients()
        if wire.replicas > 1:
            told = checksum(self._shared_tensors(self.items, plan))
            mine = Trailer(told, own_norm, mean_norm, overlaps, refreshed, inside, energy)
            trailers, _ = mine.exchange(wire, self.inside, "checksum")
            if len({one.checksum for one in trailers}) > 1:
                culprit = self._culprit([checksum(self._shared_tensors([item], plan)) for item in self.items], wire)
                raise SyncError(f"LoRDO: the replicas differ after the sync at step {report.step}: {culprit}")
            names = ("own_norm", "inside_energy", "energy", "mean_norm", "overlaps", "refreshed")
            parts = [[getattr(one, name) for name in names] for one in trailers]
            total_own, inside, energy, *of_all = torch.tensor(parts, dtype=torch.float64).sum(0).tolist()
            if shares.of_owned:
                mean_norm, overlaps, refreshed = of_all
            mean_own = total_own / max(1, report.participants)
            # Mean squared distance from the mean, by the variance identity.
            report.drift = (max(0.0, mean_own - mean_norm) / mean_norm) ** 0.5 if mean_norm > 0 else 0.0
        report.overlap = overlaps / refreshed if refreshed else None
        report.captured_gradient_energy = inside / energy if energy > 0 else None

    def _gradient_energies(self) -> tuple[float, float]:
        inside = energy = 0.0
        for item in self.items:
            measured = item.waiting.take_energies()
            if item.counts and measured is not None and all(bool(torch.isfinite(value)) for value in measured):
                inside, energy = inside + float(measured[0]), energy + float(measured[1])
        return inside, energy

    def _shared_tensors(self, items: Sequence[Fragment], plan: SyncPlan) -> Iterator[Tensor]:
        """Everything of these items that must be bitwise equal on all replicas after a sync."""
        for one in items:
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

    def _culprit(self, sums: list[int], wire: ReplicaWire) -> str:
        """The first parameter whose tensors differ between replicas, by the checksums of each. Collective."""
        rows = wire.gather(self.inside.vector(sums), "checksum").cpu()
        for column, item in enumerate(self.items):
            odd = [m for m in range(wire.replicas) if rows[m, column] != rows[0, column]]
            if odd:
                return f"{item.plan.name} on replicas {odd} against replica 0"
        return "no single parameter"
