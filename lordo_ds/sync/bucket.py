"""What a sync does with the parameters of one bucket, in order: D, weights and anchor, moments, bases.

A bucket is what travels in one message: all that a pseudo-gradient goes through between the replicas' weights and the
next anchor and basis is called from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.codec import codec_of
from lordo_ds.core.outer import pseudo_gradient
from lordo_ds.core.ownership import shared_out
from lordo_ds.core.schedule import SyncPlan
from lordo_ds.replica.bases import Bases
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.republish import republish_
from lordo_ds.sync.moments import common_moments_
from lordo_ds.sync.outer_step import OuterStep
from lordo_ds.sync.two_legs import TwoLegs


@dataclass(frozen=True)
class Round:
    """One sync: what is due, and which replicas its averages are over.

    `gives_gradient` are those of the participants that executed the step that has just ended.
    """

    plan: SyncPlan
    step: int
    participants: list[int]
    gives_gradient: list[int]
    replica: int

    @property
    def takes_part(self) -> bool:
        return self.replica in self.participants


@dataclass
class Shares:
    """This rank's share of what the report adds up: |D_m|^2, |D|^2, the overlaps of bases, and how many they are."""

    own_norm: float = 0.0
    mean_norm: float = 0.0
    overlaps: float = 0.0
    refreshed: float = 0.0


class BucketSync:
    """Collective across replicas, and inside them over the ranks that hold parts of the bucket's matrices."""

    def __init__(self, config: LordoConfig, bases: Bases, inside: InsideReplica) -> None:
        self.config, self.bases, self.inside = config, bases, inside
        self.outer_step = OuterStep(config, inside)
        self.codec = codec_of(config.pseudo_gradient_dtype)
        self.legs = TwoLegs(self.codec)

    def run_(self, bucket: Sequence[Fragment], steps: Tensor, who: Round, wire: ReplicaWire, shares: Shares) -> None:
        """D = mean of (anchor - W); W = anchor = anchor - outer(D); moments; bases from the raw D; moments in them.

        Args:
            steps: (replicas, len(bucket)), every replica's t of each item.
            shares: added to.
        """
        anchored = [item for item in bucket if "anchor" in item.state]
        means, own = self._mean_pseudo_gradients(anchored, who, wire)
        shares.own_norm += own
        shares.mean_norm += sum(float(m.square().sum()) for i, m in zip(anchored, means, strict=True) if i.counts)
        self.outer_step.run_(anchored, means, who.plan, wire.replicas)
        common_moments_(bucket, steps, who.participants, who.takes_part, who.plan, self.config, wire)
        by_item = {id(item): mean for item, mean in zip(anchored, means, strict=True)}
        for item in bucket if who.plan.refresh_basis else ():
            matrix = self._basis_matrix(item, by_item, who, wire)
            if matrix is None:
                continue
            overlap = self.bases.refresh(item, matrix, who.step)
            if overlap is not None and self.inside.tensor.index == 0:
                shares.overlaps += overlap
                shares.refreshed += 1.0
        republish_(bucket, self.inside.shard)

    def _mean_pseudo_gradients(
        self, items: list[Fragment], who: Round, wire: ReplicaWire
    ) -> tuple[list[Tensor], float]:
        """D of each item, averaged over the participants; and the squared norm of this replica's own."""
        if not items:
            return [], 0.0
        flat = items[0].weight.new_zeros(sum(item.numel for item in items))
        parts = list(flat.split([item.numel for item in items]))
        if who.takes_part:
            for item, part in zip(items, parts, strict=True):
                pseudo_gradient(item.state["anchor"], item.weight, out=part)
                if self.config.projection == "local":
                    item.waiting.own_pseudo_gradient = part.clone()
        own = sum(float(part.square().sum()) for item, part in zip(items, parts, strict=True) if item.counts)
        if wire.replicas > 1 and flat.numel():
            if self.codec.lossy:
                owned = shared_out([item.numel for item in items], wire.replicas, self.codec.block)
                self.legs.mean_(items, parts, owned, who.participants, wire, "pseudo_gradient")
                own = _around(items, parts) if who.takes_part else 0.0
            else:
                wire.sum_(flat.div_(len(who.participants)), "pseudo_gradient")
        return parts, own

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


def _around(items: Sequence[Fragment], means: Sequence[Tensor]) -> float:
    """|D_m - D|^2 + |D|^2 for what was told of D, which is not the mean that the variance identity needs."""
    total = 0.0
    for item, mean in zip(items, means, strict=True):
        if item.counts:
            off = pseudo_gradient(item.state["anchor"], item.weight).sub_(mean)
            total += float(off.square().sum() + mean.square().sum())
    return total
