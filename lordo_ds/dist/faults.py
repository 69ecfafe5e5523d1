"""Replicas that are not finite: which take part in a sync, what becomes of the others, and when the run stops."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from torch import Tensor

from lordo_ds.config import LordoConfig
from lordo_ds.dist.fragment import Fragment
from lordo_ds.dist.inside import InsideReplica
from lordo_ds.dist.report import SyncReport, all_finite
from lordo_ds.dist.wire import ReplicaWire, SyncError

logger = logging.getLogger("lordo_ds")


class Faults:
    """Keeps replicas whose state or loss is not finite out of the averages, and counts them.

    `left_out_in_a_row` and `left_out` count, per replica and since the start of the process, the syncs that it could
    not take part in; they are equal on all ranks. `why` is what it may have been. `doubtful`: this replica is left out
    of the next sync, whatever its state.
    """

    why = "not finite"

    def __init__(
        self, config: LordoConfig, items: Sequence[Fragment], wire: ReplicaWire, inside: InsideReplica
    ) -> None:
        self.config, self.items, self.wire, self.inside = config, list(items), wire, inside
        self.left_out_in_a_row = [0] * wire.replicas
        self.left_out = [0] * wire.replicas
        self.doubtful = False

    # -- which replicas take part --------------------------------------------------------------------

    def note_loss(self, loss: float, step: int) -> None:
        """The loss of a step that was executed; one that is not finite keeps this replica out of the next sync.

        A step that an overflow skipped has done no harm, whatever its loss.
        """
        if not math.isfinite(loss):
            logger.warning("LoRDO: replica %d had a loss of %s at step %d", self.wire.index, loss, step)
            self.doubtful = True

    def replica_is_finite(self) -> bool:
        """Whether this replica may take part in the sync that begins. Collective inside the replica."""
        broken = [] if all_finite([t for item in self.items for t in _tensors(item)]) else self._broken()
        for name in broken[:1]:
            logger.warning("LoRDO: %s of replica %d is not finite", name, self.wire.index)
        bad, self.doubtful = self.doubtful or bool(broken), False
        return not self.inside.any_rank(bad)

    def _broken(self) -> list[str]:
        return [item.plan.name for item in self.items if not all_finite(_tensors(item))]

    def participants(self, finite: Sequence[bool], step: int) -> list[int]:
        """The replicas to average over, given which are finite; none if they are too few.

        Raises:
            SyncError: a replica has been left out too often in a row. On all ranks at once.
        """
        found = [m for m, ok in enumerate(finite) if ok]
        for m, ok in enumerate(finite):
            self.left_out_in_a_row[m] = 0 if ok else self.left_out_in_a_row[m] + 1
            self.left_out[m] += not ok
        limit = self.config.max_left_out_syncs
        worst = max(self.left_out_in_a_row)
        if found and limit != "never" and worst >= limit:
            replicas = [m for m, count in enumerate(self.left_out_in_a_row) if count == worst]
            raise SyncError(
                f"LoRDO: replica {', '.join(map(str, replicas))} was not finite at {worst} syncs in a row, the last at "
                f"step {step}, although the others were: look at its machine and its data, and resume from a "
                f"checkpoint; {self.config.key('max_left_out_syncs')} sets how often"
            )
        return found if len(found) >= self.config.least_participants(self.wire.replicas) else []

    # -- what becomes of them ------------------------------------------------------------------------

    def reseed_(self, participants: list[int], step: int) -> None:
        """Give the replicas that were left out the basis and moments of the first participant.

        Their weights are those of all replicas already. Collective across replicas.
        """
        left_out = [m for m in range(self.wire.replicas) if m not in participants]
        if not left_out:
            return
        logger.warning(
            "LoRDO: replicas %s were %s at step %d: left out of this sync and reseeded", left_out, self.why, step
        )
        takes_part = self.wire.index in participants
        for item in self.items:
            tensors = [tensor for _, tensor, _ in item.moments()]
            tensors += [item.state["basis"]] if item.plan.low_rank else []
            for tensor in tensors:
                received = tensor if not takes_part else tensor.clone()
                self.wire.broadcast_(received, "reseed", participants[0])
            if not takes_part and item.plan.low_rank:
                any_basis = self.inside.shard.max_(item.basis.new_tensor([float(item.basis.any())]), "flags")
                item.state["has_basis"] = bool(any_basis[0])
                if "error" in item.state:
                    item.state["error"].zero_()

    def return_to_anchor_(self, report: SyncReport, finite: int, in_a_row: int) -> None:
        """Too few replicas are finite: all go back to the anchor with fresh moments, or the run stops.

        Args:
            finite: how many replicas are.
            in_a_row: how many syncs, this one included, have ended so without one that did not.

        Raises:
            SyncError: they are too many. On all ranks at once.
        """
        report.returned_to_anchor = True
        least = self.config.least_participants(self.wire.replicas)
        who = f"only {finite} of {self.wire.replicas} replicas" if finite else "no replica"
        key = self.config.key("min_participants")
        rule = f", fewer than {key} = {self.config.min_participants}" if least > 1 else ""
        logger.warning(
            "LoRDO: %s finite at step %d%s (%d in a row): back to the anchor",
            f"{who} {'are' if finite > 1 else 'is'}", report.step, rule, in_a_row,
        )  # fmt: skip
        if in_a_row >= self.config.max_nonfinite_syncs:
            raise SyncError(
                f"LoRDO: {who} {'were' if finite > 1 else 'was'} finite at {in_a_row} syncs in a row{rule}, the last "
                f"at step {report.step}: lower the learning rate, or resume from a checkpoint before it"
            )
        for item in self.items:
            item.weight.copy_(item.state["anchor"])
            for _, tensor, _ in item.moments():
                tensor.zero_()
            if "error" in item.state:
                item.state["error"].zero_()
            item.state["step"] = 0


def _tensors(item: Fragment) -> list[Tensor]:
    """Everything of a fragment that can break."""
    error = [] if item.error is None else [item.error]
    return [item.weight, *(tensor for _, tensor, _ in item.moments()), *error]
