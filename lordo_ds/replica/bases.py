"""Every matrix's basis: where it comes from, when, and that it ends equal on all ranks of a replica that hold it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.config import LordoConfig
from lordo_ds.core.basis import WholeMatrix, overlap, refresh_basis, sketch_seed
from lordo_ds.core.inner import rotate_moments_
from lordo_ds.core.schedule import FIRST_STEPS, first_basis_due
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.republish import republish_
from lordo_ds.replica.sharded_matrix import ShardedMatrix

logger = logging.getLogger("lordo_ds")

_NAMED = 4  # parameters that one message names


class Bases:
    """The bases of one rank's matrices, refreshed together with the ranks that hold their other parts.

    Every rank of a replica follows the same control flow, also one without a matrix of its own (a pipeline stage of
    embeddings only). Nothing here crosses replicas.

    `each_replica_its_own`: replicas do not share their bases. `at_owners`: they share what the owner of each computes.
    `some_replica_has_stepped`: as far as this rank knows.
    """

    def __init__(
        self, config: LordoConfig, items: Sequence[Fragment], inside: InsideReplica, each_replica_its_own: bool
    ) -> None:
        self.config, self.inside = config, inside
        self.items = [item for item in items if item.plan.low_rank]
        self.each_replica_its_own, self.at_owners = each_replica_its_own, False
        self.some_replica_has_stepped = False
        self._complete = False
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
        stepped = executed_before > 0 if self.each_replica_its_own else self.some_replica_has_stepped
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
        self._complete = self.some_replica_has_stepped = False

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

    def say(self, step: int) -> None:
        """One line for all the matrices that something new holds for."""
        for (what, note), names in self._news.items():
            named = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} others" if len(names) > _NAMED else "")
            logger.warning("LoRDO: %s of %s at step %d: %s", what, named, step, note)
        self._news.clear()
        waiting = [item.plan.name for item in self.items if not item.has_basis]
        level = logging.INFO if step < FIRST_STEPS else logging.WARNING
        some_replica_has_stepped = self.each_replica_its_own or self.some_replica_has_stepped
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
        self.say(step)
        notes, self._notes = self._notes, {}
        return notes | {item.plan.name: "no gradient yet, and no basis" for item in self.items if not item.has_basis}
