"""Every matrix's basis: where it comes from, when, and that it ends equal on all ranks that hold the matrix."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.basis import WholeMatrix, overlap, refresh_basis, sketch_seed
from lordo_ds.core.inner import rotate_moments_
from lordo_ds.core.schedule import FIRST_STEPS, first_basis_due
from lordo_ds.costs import Links, first_basis_bytes
from lordo_ds.replica.fragment import Fragment, ShardedMatrix
from lordo_ds.sync.moments import republish_

logger = logging.getLogger("lordo_ds")

_NAMED = 4  # parameters that one message names
_FLAGS = 4  # step, gives a gradient, steps executed before, executed now


class Bases:
    """The bases of one rank's matrices, refreshed together with the ranks that hold their other parts.

    Every rank of a replica follows the same control flow, also one without a matrix of its own (a pipeline stage of
    embeddings only).
    """

    def __init__(
        self, config: LordoConfig, items: Sequence[Fragment], wire: ReplicaWire, inside: InsideReplica
    ) -> None:
        self.config, self.wire, self.inside = config, wire, inside
        self.items = [item for item in items if item.plan.low_rank]
        self.each_replica_its_own = wire.replicas == 1 or config.projection == "local"
        self._complete = False
        self._some_replica_has_stepped = False  # as far as this rank knows
        self._notes: dict[str, str] = {}
        self._told: set[tuple[str, str]] = set()
        self._news: dict[tuple[str, str], list[str]] = {}
        self._told_of_waiting: set[int] = set()

    # -- the first basis -----------------------------------------------------------------------------

    def may_be_first(self, step: int, executed_before: int) -> bool:
        """Whether attempted step `step` may give first bases; where replicas share them, equal on all of them.

        Args:
            executed_before: steps that this replica has executed before this one.
        """
        stepped = executed_before > 0 if self.each_replica_its_own else self._some_replica_has_stepped
        return not stepped or first_basis_due(self.config, step)

    def wait_for_all_replicas(self, step: int) -> bool:
        """Whether some matrix has no basis yet that all replicas together may give it at the end of this step.

        Collective over the replica, in steps that may give bases, until all matrices have theirs.
        """
        if self.each_replica_its_own or self._complete or not self.may_be_first(step, 0):
            return False
        waits = any(not item.has_basis for item in self.items)
        self._complete = not self.inside.any_rank(waits)
        return not self._complete

    def look_again(self) -> None:
        """States were loaded: whether bases are missing, and replicas have stepped, must be asked anew."""
        self._complete = self._some_replica_has_stepped = False

    def first(self, step: int, executed_before: int, executed_now: bool) -> None:
        """Bases from the gradients averaged over the replicas that executed the step and are finite. Collective.

        A matrix whose average is zero still has none then. Of those that are zero on this rank in every replica no
        element travels.

        Args:
            executed_before: steps that this replica has executed before this one.
            executed_now: whether it executed this one.
        """
        waiting = [item for item in self.items if not item.has_basis]
        peaks = _peaks(waiting)
        gives = not self.inside.any_rank(not executed_now or not all(map(math.isfinite, peaks)))
        fields = [step, int(gives), executed_before, int(executed_now)]
        assert len(fields) == _FLAGS
        mine = fields + [int(peak > 0) for peak in peaks]
        flags = self.wire.gather(self.inside.vector(mine), "first_basis").cpu()
        self.wire.assert_same("step", flags[:, 0])
        stepped_before = bool(flags[:, 2].any())
        self._some_replica_has_stepped = stepped_before or bool(flags[:, 3].any())
        givers = flags[:, 1].nonzero().flatten()
        if not len(givers) or (stepped_before and not first_basis_due(self.config, step)):
            return
        for column, item in enumerate(waiting, start=_FLAGS):
            mean = torch.zeros_like(item.weight)
            if bool(flags[givers, column].any()):
                if gives and item.gradient is not None:
                    mean.copy_(item.gradient)
                self.wire.sum_(mean, "first_basis").div_(len(givers))
            self.refresh(item, mean, step)
        self._say(step)

    def predicted_bytes(self) -> int:
        """Bytes that this rank sends across replicas in a step that gives all matrices their first bases."""
        links = Links(self.wire.replicas, self.wire.twins.size)
        return first_basis_bytes(self.config, [item.holding for item in self.items], links, _FLAGS)

    # -- refreshes -----------------------------------------------------------------------------------

    def refresh_in_step(self, item: Fragment, elements: Tensor, step: int) -> None:
        """`refresh` from a replica's own gradient, inside a step."""
        self.refresh(item, elements, step)
        republish_([item], self.inside.shard)

    def refresh(self, item: Fragment, elements: Tensor, step: int) -> float | None:
        """Refresh one basis from a matrix laid out like the fragment, and express the moments in it.

        Collective over the ranks of the replica that hold parts of the matrix; bitwise equal on them.

        Returns:
            The overlap of the new basis with the previous one, or None for a first basis, or none yet.
        """
        old = item.whole_basis().clone() if item.has_basis else None
        whole = item.comm.size * item.slices.size == 1
        refreshed = refresh_basis(
            WholeMatrix(item.plan.orient(elements.view(item.plan.shape))) if whole else ShardedMatrix(item, elements),
            old,
            item.plan.rank,
            method=self.config.basis_update,
            source=self.config.basis_source,
            seed=sketch_seed(item.plan.basis_side, step),
        )
        if old is None and self._still_none(item, refreshed.basis is None):
            return None
        if refreshed.note:
            self._tell(item.plan.name, refreshed.note, "keeping the previous basis" if refreshed.kept else "basis")
        assert refreshed.basis is not None
        new = item.publish_(refreshed.basis.contiguous())
        if old is not None and not refreshed.kept:
            moments = item.state["exp_avg"], item.state["exp_avg_sq"]
            rotate_moments_(*moments, new.mT @ old, item.betas, item.step)
        item.store_basis(new)
        return None if old is None else overlap(new, old)

    @staticmethod
    def _still_none(item: Fragment, none: bool) -> bool:
        """The first rank's answer: whether the matrix has no basis yet must be the same on all that hold it."""
        if item.comm.size * item.inside.tensor.size == 1:
            return none
        return bool(item.publish_(torch.tensor([int(none)], device=item.weight.device))[0])

    # -- what is told --------------------------------------------------------------------------------

    def _tell(self, name: str, note: str, what: str) -> None:
        # A lasting condition is told once a parameter; the report of every sync carries it.
        if (name, note) not in self._told:
            self._told.add((name, note))
            self._news.setdefault((what, note), []).append(name)
        self._notes[name] = note

    def _say(self, step: int) -> None:
        """One line for all the matrices that something new holds for."""
        for (what, note), names in self._news.items():
            named = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} others" if len(names) > _NAMED else "")
            logger.warning("LoRDO: %s of %s at step %d: %s", what, named, step, note)
        self._news.clear()
        waiting = [item.plan.name for item in self.items if not item.has_basis]
        level = logging.INFO if step < FIRST_STEPS else logging.WARNING
        some_replica_has_stepped = self.each_replica_its_own or self._some_replica_has_stepped
        if waiting and some_replica_has_stepped and level not in self._told_of_waiting:
            self._told_of_waiting.add(level)
            logger.log(
                level,
                "LoRDO: %d matrices have had no gradient by step %d, the first %s: they get a basis with their first "
                "one; freeze what is not trained (requires_grad_(False))",
                len(waiting), step, waiting[0],
            )  # fmt: skip

    def take_notes(self, step: int) -> dict[str, str]:
        """What was unusual, by parameter, since the last call; what is new is said."""
        self._say(step)
        notes, self._notes = self._notes, {}
        return notes | {item.plan.name: "no gradient yet, and no basis" for item in self.items if not item.has_basis}


def _peaks(items: Sequence[Fragment]) -> list[float]:
    """Largest absolute value of each item's gradient on this rank; nan or inf where it is not finite."""
    peaks = [0.0] * len(items)
    given = [(i, item.gradient) for i, item in enumerate(items) if item.gradient is not None and item.numel]
    if given:
        norms = torch._foreach_norm([gradient for _, gradient in given], float("inf"))
        for (i, _), peak in zip(given, torch.stack(list(norms)).tolist(), strict=True):
            peaks[i] = peak
    return peaks
