"""Every matrix's basis: where it comes from, when, and that it ends equal on all ranks that hold the matrix."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from lordo_ds.config import LordoConfig
from lordo_ds.core.basis import WholeMatrix, overlap, refresh_basis, sketch_seed
from lordo_ds.core.inner import rotate_moments_
from lordo_ds.dist.fragment import Fragment, ShardedMatrix
from lordo_ds.dist.inside import InsideReplica
from lordo_ds.dist.moments import republish_
from lordo_ds.dist.report import all_finite
from lordo_ds.dist.wire import ReplicaWire

logger = logging.getLogger("lordo_ds")


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
        self._notes: dict[str, str] = {}
        self._told: set[tuple[str, str]] = set()

    # -- the first basis -----------------------------------------------------------------------------

    def wait_for_all_replicas(self) -> bool:
        """Whether some matrix of the replica has no basis yet that only all replicas together can give it.

        Collective over the replica until none has, and again after `look_again`.
        """
        if self.each_replica_its_own or self._complete:
            return False
        waits = any(not item.has_basis for item in self.items)
        self._complete = not self.inside.any_rank(waits)
        return not self._complete

    def look_again(self) -> None:
        """States were loaded: whether bases are missing must be asked anew."""
        self._complete = False

    def first(self, step: int) -> bool:
        """Bases from the first gradient averaged over the replicas that executed it. Collective.

        Returns:
            Whether there was such a replica; otherwise it is tried again after the next step.
        """
        waiting = [item for item in self.items if not item.has_basis]
        skipped = bool(waiting) and not any(item.settings is not None for item in waiting)
        broken = not all_finite([item.gradient for item in waiting if item.gradient is not None])
        executed = not self.inside.any_rank(skipped or broken)
        flags = self.wire.gather(self.inside.vector([step, int(executed)]), "first_basis")
        self.wire.assert_same("step", flags[:, 0])
        givers = int(flags[:, 1].sum())
        if givers == 0:
            for item in waiting:  # a replica that skips the next attempt must not apply this one then
                item.gradient = item.settings = None
            return False
        for item in waiting:
            mean = torch.zeros_like(item.weight)
            if executed and item.gradient is not None:
                mean.copy_(item.gradient)
            self.wire.sum_(mean, "first_basis").div_(givers)
            self.refresh(item, mean, step)
        return True

    # -- refreshes -----------------------------------------------------------------------------------

    def refresh_in_step(self, item: Fragment, elements: Tensor, step: int) -> None:
        """`refresh` from a replica's own gradient, inside a step."""
        self.refresh(item, elements, step)
        republish_([item], self.inside.shard)

    def refresh(self, item: Fragment, elements: Tensor, step: int) -> float | None:
        """Refresh one basis from a matrix laid out like the fragment, and express the moments in it.

        Collective over the ranks of the replica that hold parts of the matrix; bitwise equal on them.

        Returns:
            The overlap of the new basis with the previous one, or None for a first basis.
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
        if refreshed.note:
            kept = "keeping the previous basis" if old is not None else "columns of the identity as first basis"
            self._tell(item.plan.name, step, refreshed.note, kept if refreshed.kept else "basis")
        new = item.publish_(refreshed.basis.contiguous())
        if old is not None and not refreshed.kept:
            moments = item.state["exp_avg"], item.state["exp_avg_sq"]
            rotate_moments_(*moments, new.mT @ old, item.betas, item.step)
        item.store_basis(new)
        return None if old is None else overlap(new, old)

    def _tell(self, name: str, step: int, note: str, what: str) -> None:
        # A lasting condition is told once a parameter; the report of every sync carries it.
        level = logging.DEBUG if (name, note) in self._told else logging.WARNING
        self._told.add((name, note))
        logger.log(level, "LoRDO: %s of %s at step %d: %s", what, name, step, note)
        self._notes[name] = note

    def take_notes(self) -> dict[str, str]:
        """What was unusual, by parameter, since the last call."""
        notes, self._notes = self._notes, {}
        return notes
