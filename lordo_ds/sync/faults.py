"""Replicas that are not finite, or wrong: which take part in a sync, what becomes of the others, when the run stops."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.finite import all_finite
from lordo_ds.errors import SyncError
from lordo_ds.replica.fragment import Fragment
from lordo_ds.sync.header import RankCondition
from lordo_ds.sync.members import Members
from lordo_ds.sync.outliers import SIZES, far_from_others, kept_tensors, of_whole_replica, sizes_of
from lordo_ds.sync.report import SyncReport

logger = logging.getLogger("lordo_ds")

_WEIGHT = list(SIZES).index("weight")


@dataclass(frozen=True)
class Condition:
    """What one replica says of itself before a sync; equal on all of its ranks.

    `sizes` are in the order of `SIZES`; `groups` is a digest of the values of its parameter groups.
    """

    finite: bool = True
    sizes: tuple[float, ...] = (0.0,) * len(SIZES)
    groups: int = 0


class Faults:
    """Keeps replicas whose state or loss is not finite, or far from the others', out of the averages, and counts them.

    `left_out_in_a_row`, `left_out` and `as_outlier` count, per replica and since the start of the process, the syncs
    that it could not take part in, the last one those where it was finite; they are equal on all ranks. `doubtful`:
    this replica is left out of the next sync, whatever its state.
    """

    def __init__(self, config: LordoConfig, items: Sequence[Fragment], wire: ReplicaWire) -> None:
        self.config, self.items, self.wire = config, list(items), wire
        self.members = Members()
        self.doubtful = False
        self.count_anew()

    def use_wire(self, wire: ReplicaWire, members: Members) -> None:
        self.wire, self.members = wire, members
        self.count_anew()

    def count_anew(self) -> None:
        """The replicas are others than before, or numbered otherwise."""
        replicas = self.wire.replicas
        self.left_out_in_a_row = [0] * replicas
        self.left_out = [0] * replicas
        self.as_outlier = [0] * replicas
        # The sizes that each replica had at the last sync that it took part in.
        self._sizes_before = [[0.0] * len(SIZES) for _ in range(replicas)]
        self._rebuilt = False

    def mark(self) -> tuple[bool, list[int], list[int], list[int]]:
        """What `return_to` needs to undo the counts of a sync."""
        return self.doubtful, list(self.left_out), list(self.left_out_in_a_row), list(self.as_outlier)

    def return_to(self, mark: tuple[bool, list[int], list[int], list[int]]) -> None:
        self.doubtful, self.left_out, self.left_out_in_a_row, self.as_outlier = mark

    # -- which replicas take part --------------------------------------------------------------------

    def note_loss(self, loss: float, step: int) -> None:
        """The loss of a step that was executed; one that is not finite keeps this replica out of the next sync.

        A step that an overflow skipped has done no harm, whatever its loss.
        """
        if not math.isfinite(loss):
            logger.warning("LoRDO: replica %d had a loss of %s at step %d", self.wire.index, loss, step)
            self.doubtful = True

    @property
    def judges(self) -> bool:
        """Whether replicas are held against each other."""
        return self.wire.replicas > 1 and self.config.max_outlier != "never"

    def own_condition(self, groups: int) -> RankCondition:
        """Of this rank, for the sync that begins.

        Args:
            groups: this rank's digest of its parameter groups.
        """
        own = sizes_of(self.items, self.judges)
        bad, self.doubtful = self.doubtful or not all(map(math.isfinite, own)), False
        if not all(map(math.isfinite, own)):
            logger.warning("LoRDO: %s of replica %d is not finite", self._broken(), self.wire.index)
        return RankCondition(bad, groups, tuple(own))

    @staticmethod
    def condition(mine: RankCondition, inside: InsideReplica) -> Condition:
        """Of this replica, from those of its ranks. Collective inside it."""
        ranks, _ = mine.exchange(inside.everyone, inside, "flags")
        sizes = of_whole_replica(torch.tensor([rank.sizes for rank in ranks], dtype=torch.float64))
        return Condition(not any(rank.bad for rank in ranks), tuple(sizes), sum(rank.groups for rank in ranks))

    def _broken(self) -> str:
        for item in self.items:
            if not all_finite([tensor for _, tensor in kept_tensors(item)]):
                return item.plan.name
        return "an anchor"

    def fit(
        self,
        finite: Sequence[bool],
        sizes: Sequence[Sequence[float]],
        executed_steps: Sequence[int],
        loaded: Sequence[bool],
        report: SyncReport,
    ) -> list[bool]:
        """Which replicas are finite and not far from the others; who is far is noted in the report.

        Args:
            sizes: of every replica, see `Condition`.
            loaded: the replicas whose weights somebody changed, and with them their anchors.
        """
        limit = self.config.max_outlier
        if self.judges and limit != "never":
            report.outliers = far_from_others(sizes, finite, executed_steps, self._sizes_before, limit)
        for m, words in report.outliers.items():
            self.as_outlier[m] += 1
            logger.warning("LoRDO: replica %d is far from the others at step %d: %s", m, report.step, words)
        # Of these the anchor may be what is wrong.
        fit = [ok and m not in report.outliers for m, ok in enumerate(finite)]
        self._rebuilt = bool(report.outliers) or any(
            (math.isfinite(own[_WEIGHT]) and not math.isfinite(own[0])) or (loaded[m] and not fit[m])
            for m, own in enumerate(sizes)
        )
        for m, own in enumerate(sizes):
            if fit[m]:
                self._sizes_before[m] = [new or old for new, old in zip(own, self._sizes_before[m], strict=True)]
        return fit

    def participants(self, fit: Sequence[bool], report: SyncReport) -> list[int]:
        """The replicas to average over, given which may be; none if they are too few.

        Raises:
            SyncError: a replica has been left out too often in a row. On all ranks at once.
        """
        found = [m for m, ok in enumerate(fit) if ok]
        for m, ok in enumerate(fit):
            self.left_out_in_a_row[m] = 0 if ok else self.left_out_in_a_row[m] + 1
            self.left_out[m] += not ok
        limit = self.config.max_left_out_syncs
        worst = max(self.left_out_in_a_row)
        if found and limit != "never" and worst >= limit:
            replicas = [m for m, count in enumerate(self.left_out_in_a_row) if count == worst]
            far = set(replicas) <= set(report.outliers)
            why, others = ("far from the others", "near each other") if far else ("not finite", "finite")
            raise SyncError(
                f"LoRDO: replica {', '.join(map(str, replicas))} was {why} at {worst} syncs in a row, the last at "
                f"step {report.step}, although the others were {others}: look at its machine and its data, and resume "
                f"from a checkpoint; {self.config.key('max_left_out_syncs')} sets how often"
            )
        return found if len(found) >= self.members.least(self.config, self.wire.replicas) else []

    # -- what becomes of them ------------------------------------------------------------------------

    def say_left_out(self, participants: list[int], report: SyncReport) -> None:
        left_out = [m for m in range(self.wire.replicas) if m not in participants]
        if left_out:
            why = "far from the others" if set(left_out) <= set(report.outliers) else self.members.why_left_out
            logger.warning(
                "LoRDO: replicas %s were %s at step %d: left out of this sync and reseeded", left_out, why, report.step
            )

    def reseed_(
        self, items: Sequence[Fragment], participants: list[int], wire: ReplicaWire, inside: InsideReplica
    ) -> None:
        """Give the replicas that were left out the basis and moments of the first participant, after their sync.

        Their weights are those of all replicas already, unless it is their anchors that are wrong: then weights,
        anchors and outer momentum come from there too. Collective across replicas.
        """
        if len(participants) == wire.replicas:
            return
        takes_part = wire.index in participants
        for item in items:
            tensors = _moments_and_basis(item)
            if self._rebuilt:
                tensors += [item.weight, *(item.state[n] for n in ("outer_momentum",) if n in item.state)]
            for tensor in tensors:
                wire.broadcast_(tensor if not takes_part else tensor.clone(), "reseed", participants[0])
            if self._rebuilt and not takes_part and "anchor" in item.state:
                item.state["anchor"].copy_(item.weight)
            if not takes_part:
                _adopted_(item, inside)

    def reseed_between_syncs_(
        self, items: Sequence[Fragment], participants: list[int], wire: ReplicaWire, inside: InsideReplica
    ) -> None:
        """The same for parameters that did not sync now: of the others at their anchors, of the first participant else.

        Collective across replicas.
        """
        if len(participants) == wire.replicas:
            return
        takes_part = wire.index in participants
        steps = inside.vector([item.step for item in items])
        wire.broadcast_(steps, "reseed", participants[0])
        for item, step in zip(items, steps.tolist(), strict=True):
            tensors = _moments_and_basis(item)
            if self._rebuilt:
                tensors += [item.state[name] for name in ("anchor", "outer_momentum") if name in item.state]
            for tensor in tensors:
                wire.broadcast_(tensor if not takes_part else tensor.clone(), "reseed", participants[0])
            if not takes_part:
                item.weight.copy_(item.state["anchor"])
                item.state["step"] = step
                _adopted_(item, inside)

    def refuse_too_few(self, report: SyncReport, finite: int, in_a_row: int) -> None:
        """Too few replicas are finite: all must go back to the anchor, or the run stops.

        Args:
            finite: how many replicas are.
            in_a_row: how many syncs, this one included, have ended so without one that did not.

        Raises:
            SyncError: they are too many. On all ranks at once.
        """
        report.returned_to_anchor = True
        least = self.members.least(self.config, self.wire.replicas)
        who = f"only {finite} of {self.wire.replicas} replicas" if finite else "no replica"
        key, state = self.config.key("min_participants"), "finite and near the others" if report.outliers else "finite"
        rule = f", fewer than {key} = {self.config.min_participants}" if least > 1 else ""
        logger.warning(
            "LoRDO: %s %s at step %d%s (%d in a row): back to the anchor",
            f"{who} {'are' if finite > 1 else 'is'}", state, report.step, rule, in_a_row,
        )  # fmt: skip
        if in_a_row >= self.config.max_nonfinite_syncs:
            raise SyncError(
                f"LoRDO: {who} {'were' if finite > 1 else 'was'} {state} at {in_a_row} syncs in a row{rule}, the last "
                f"at step {report.step}: lower the learning rate, or resume from a checkpoint before it"
            )


def return_to_anchor_(items: Sequence[Fragment]) -> None:
    """With fresh moments in the old basis."""
    for item in items:
        item.weight.copy_(item.state["anchor"])
        for _, tensor, _ in item.moments():
            tensor.zero_()
        item.forget_errors_()
        item.state["step"] = 0


def _moments_and_basis(item: Fragment) -> list[Tensor]:
    moments = [tensor for _, tensor, _ in item.moments()]
    return moments + ([item.state["basis"]] if item.plan.low_rank else [])


def _adopted_(item: Fragment, inside: InsideReplica) -> None:
    """The basis and the moments are another replica's."""
    if item.plan.low_rank:
        any_basis = inside.shard.max_(item.basis.new_tensor([float(item.basis.any())]), "flags")
        item.state["has_basis"] = bool(any_basis[0])
    item.forget_errors_()
