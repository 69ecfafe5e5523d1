"""What a sync does with the parameters of one bucket, in order: D, weights and anchor, moments, bases.

A bucket is what travels in one message: all that a pseudo-gradient goes through between the replicas' weights and the
next anchor and basis is called from here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.codec import codec_of
from lordo_ds.core.outer import pseudo_gradient
from lordo_ds.costs import ownership
from lordo_ds.replica.bases import Bases
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.republish import republish_
from lordo_ds.sync.at_owners import AtOwners
from lordo_ds.sync.moments import average_moments_, common_steps_
from lordo_ds.sync.outer_step import OuterStep
from lordo_ds.sync.rounds import Round, Shares
from lordo_ds.sync.two_legs import TwoLegs


class BucketSync:
    """Collective across replicas, and inside them over the ranks that hold parts of the bucket's matrices."""

    def __init__(self, config: LordoConfig, bases: Bases, inside: InsideReplica) -> None:
        self.config, self.bases, self.inside = config, bases, inside
        self.outer_step = OuterStep(config, inside)
        self.codec = codec_of(config.pseudo_gradient_dtype)
        self.legs = TwoLegs(self.codec)
        self.at_owners = AtOwners(config, bases, self.outer_step, self.legs)
        self.work_at_owners = False  # `OuterSync.share_out` says

    def run_(self, bucket: Sequence[Fragment], steps: Tensor, who: Round, wire: ReplicaWire, shares: Shares) -> None:
        """D = mean of (anchor - W); W = anchor = anchor - outer(D); moments; bases from the raw D; moments in them.

        Args:
            steps: (replicas, len(bucket)), every replica's t of each item.
            shares: added to.
        """
        anchored = [item for item in bucket if "anchor" in item.state]
        flat, parts = self._own_pseudo_gradients(anchored, who)
        if self.work_at_owners:
            self.at_owners.run_(bucket, parts, steps, who, wire, shares)
            return
        own = _squared_norm(anchored, parts)
        if wire.replicas > 1 and flat.numel():
            if not self.codec.lossy:
                wire.sum_(flat.div_(len(who.participants)), "pseudo_gradient")
            else:
                self._average_in_two_legs_(anchored, parts, who, wire)
                own = _around(anchored, parts) if who.takes_part else 0.0
        shares.own_norm += own
        shares.mean_norm += _squared_norm(anchored, parts)
        self.outer_step.run_(anchored, parts, who.plan, wire.replicas)
        common_steps_(bucket, steps, who)
        average_moments_(bucket, steps, who, self.config, wire)
        by_item = {id(item): mean for item, mean in zip(anchored, parts, strict=True)}
        for item in bucket if who.plan.refresh_basis else ():
            matrix = self._basis_matrix(item, by_item, who, wire)
            if matrix is None:
                continue
            shares.add_overlap(self.bases.refresh(item, matrix, who.step), self.inside.tensor.index == 0)
        republish_(bucket, self.inside.shard)

    def _own_pseudo_gradients(self, items: Sequence[Fragment], who: Round) -> tuple[Tensor, list[Tensor]]:
        """D_m of all items, and views of it, one for each; zeros where this replica does not take part."""
        if not items:
            return torch.empty(0), []
        flat = items[0].weight.new_zeros(sum(item.numel for item in items))
        parts = list(flat.split([item.numel for item in items]))
        if who.takes_part:
            for item, part in zip(items, parts, strict=True):
                pseudo_gradient(item.state["anchor"], item.weight, out=part)
                if self.config.projection == "local":
                    item.waiting.own_pseudo_gradient = part.clone()
        return flat, parts

    def _average_in_two_legs_(
        self, items: Sequence[Fragment], parts: Sequence[Tensor], who: Round, wire: ReplicaWire
    ) -> None:
        """Make this replica's D what the owners tell of the mean."""
        owned = ownership([item.holding for item in items], wire.replicas, False, self.codec.block)
        mean = self.legs.to_owners(parts, owned, who.participants, wire, "pseudo_gradient", items)
        self.legs.to_all(mean.div_(len(who.participants)), parts, owned, wire, "pseudo_gradient", items)

    def _basis_matrix(self, item: Fragment, means: dict[int, Tensor], who: Round, wire: ReplicaWire) -> Tensor | None:
        """What the basis of this item is refreshed from at a sync; None where a sync does not refresh it."""
        if not item.plan.low_rank or not item.has_basis:
            return None
        if self.config.basis_source != "gradient":
            if self.config.projection == "local" and wire.replicas > 1:
                return item.waiting.own_pseudo_gradient
            return means[id(item)]
        if self.bases.each_replica_its_own:
            return None  # refreshed inside the due step already
        matrix = torch.zeros_like(item.weight)
        if who.replica in who.gives_gradient and item.waiting.gradient is not None:
            matrix.copy_(item.waiting.gradient)
        return wire.sum_(matrix, "gradient").div_(max(1, len(who.gives_gradient)))


def _squared_norm(items: Sequence[Fragment], parts: Sequence[Tensor]) -> float:
    return sum(float(part.square().sum()) for item, part in zip(items, parts, strict=True) if item.counts)


def _around(items: Sequence[Fragment], means: Sequence[Tensor]) -> float:
    """|D_m - D|^2 + |D|^2 for what was told of D, which is not the mean that the variance identity needs."""
    total = 0.0
    for item, mean in zip(items, means, strict=True):
        if item.counts:
            off = pseudo_gradient(item.state["anchor"], item.weight).sub_(mean)
            total += float(off.square().sum() + mean.square().sum())
    return total
