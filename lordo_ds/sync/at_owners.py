"""A sync of one bucket with the work at the owners: each replica steps, and refreshes the bases of, what it owns.

    all to the owners    D, and moments where they are averaged
    each owner           momentum, gain, orthogonalizing; the basis from D; averaged moments in the new basis
    owners to all        outer(D), moments, bases

Nothing that is told is computed again by those who are told it: the replicas end equal bit by bit, also where their
hardware rounds otherwise. The outer momentum is kept once in all replicas together.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.codec import codec_of
from lordo_ds.core.finite import all_finite
from lordo_ds.core.inner import rotate_moments_
from lordo_ds.core.ownership import Segment
from lordo_ds.costs import ownership
from lordo_ds.replica.bases import Bases
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.republish import republish_
from lordo_ds.sync.moments import Averaged, averaged_moments, common_steps_
from lordo_ds.sync.outer_step import OuterStep
from lordo_ds.sync.rounds import Round, Shares
from lordo_ds.sync.two_legs import Owned, TwoLegs, split

logger = logging.getLogger("lordo_ds")

OfOneKind = tuple[str, list[Tensor], Owned]  # moments that are averaged, as vectors, and who owns what of them


class AtOwners:
    """Collective across replicas; inside each of them over the ranks that hold parts of the matrices it owns."""

    def __init__(self, config: LordoConfig, bases: Bases, outer_step: OuterStep, legs: TwoLegs) -> None:
        self.config, self.bases, self.outer_step = config, bases, outer_step
        self.shard = bases.inside.shard
        self.legs, self.exact = legs, TwoLegs(codec_of("fp32"))

    def run_(
        self,
        bucket: Sequence[Fragment],
        parts: Sequence[Tensor],
        steps: Tensor,
        who: Round,
        wire: ReplicaWire,
        shares: Shares,
    ) -> None:
        """See `BucketSync.run_`.

        Args:
            parts: this replica's D of each item; overwritten.
        """
        owned = ownership([item.holding for item in bucket], wire.replicas, True, self.legs.codec.block)
        mine = owned[wire.index]

        def squared_norm(values: Tensor) -> float:
            return sum(float(part.square().sum()) for s, part in split(values, mine) if bucket[s.item].counts)

        def add_norm(said: Tensor) -> None:
            shares.own_norm += squared_norm(said)

        legs, participants = self.legs, who.participants
        mean = legs.to_owners(parts, owned, participants, wire, "pseudo_gradient", bucket, look_at=add_norm)
        mean.div_(len(participants))
        means = [part for _, part in split(mean, mine)]
        shares.of_owned = True
        shares.mean_norm += squared_norm(mean)
        updates = torch.cat([mean.new_empty(0), *self._updates(bucket, mine, means, who)])
        self.legs.to_all(updates, parts, owned, wire, "pseudo_gradient", bucket)
        self.outer_step.apply_(bucket, parts)
        common_steps_(bucket, steps, who)
        averaged = self._moments_to_owners(bucket, owned, steps, who, wire)
        if not who.plan.refresh_basis:
            self._moments_to_all(averaged, wire)
        else:
            self._refresh(bucket, owned, means, averaged, who, wire, shares)
        republish_(bucket, self.shard)

    # -- the outer step ------------------------------------------------------------------------------

    def _updates(
        self, bucket: Sequence[Fragment], mine: Sequence[Segment], means: Sequence[Tensor], who: Round
    ) -> list[Tensor]:
        """outer(D) of what this replica owns."""
        if who.plan.plain_average:
            return list(means)
        items = [bucket[segment.item] for segment in mine]
        momenta: list[Tensor] = [item.state["owner_momentum"] for item in items]
        if not all_finite(momenta):
            # Nobody else has it, and what comes of it goes to all.
            logger.warning("LoRDO: an outer momentum of replica %d was not finite: it starts again", who.replica)
            for momentum in momenta:
                momentum.zero_()
        return self.outer_step.updates(items, means, momenta)

    # -- moments -------------------------------------------------------------------------------------

    def _moments_to_owners(
        self, bucket: Sequence[Fragment], owned: Owned, steps: Tensor, who: Round, wire: ReplicaWire
    ) -> list[OfOneKind]:
        """Averages of what this replica owns, put in place; of each kind the vectors, and who owns what of them."""
        found: list[OfOneKind] = []
        for kind, chosen in averaged_moments(bucket, steps, who, self.config):
            vectors, owners = [tensor.view(-1) for _, tensor, _ in chosen], _owners_of(bucket, owned, chosen)
            weighted = [tensor.view(-1) * weight for _, tensor, weight in chosen]
            everyone = range(wire.replicas)  # those that are left out have zeros
            mean = self.exact.to_owners(weighted, owners, everyone, wire, kind)
            for segment, values in split(mean, owners[wire.index]):
                vectors[segment.item][segment.start : segment.stop] = values
            found.append((kind, vectors, owners))
        return found

    def _moments_to_all(self, averaged: Sequence[OfOneKind], wire: ReplicaWire) -> None:
        for kind, vectors, owners in averaged:
            mine = owners[wire.index]
            values = torch.cat([vectors[0].new_empty(0), *(vectors[s.item][s.start : s.stop] for s in mine)])
            self.exact.to_all(values, vectors, owners, wire, kind)

    # -- bases ---------------------------------------------------------------------------------------

    def _refresh(
        self,
        bucket: Sequence[Fragment],
        owned: Owned,
        means: Sequence[Tensor],
        averaged: Sequence[OfOneKind],
        who: Round,
        wire: ReplicaWire,
        shares: Shares,
    ) -> None:
        """New bases, and the moments in them.

        Where both moments are averaged the owners tell them as they are in the new basis. Where one is, each replica
        needs it in the old basis to re-express the other; where none is, each re-expresses its own.
        """
        mine, plan = owned[wire.index], who.plan
        both = plan.average_exp_avg and plan.average_exp_avg_sq
        own = {segment.item for segment in mine}
        others = [item for i, item in enumerate(bucket) if i not in own and item.plan.low_rank and item.has_basis]
        if not both:
            self._moments_to_all(averaged, wire)
        old = [] if both else [item.whole_basis().clone() for item in others]
        for segment, mean in zip(mine, means, strict=True):
            item = bucket[segment.item]
            if item.plan.low_rank and item.has_basis:
                shares.add_overlap(self.bases.refresh(item, mean, who.step), self.bases.inside.tensor.index == 0)
        republish_([bucket[segment.item] for segment in mine], self.shard)
        self._bases_to_all(bucket, owned, wire)
        for item, basis in zip(others, old, strict=False):
            rotate_moments_(*_moments(item), item.whole_basis().mT @ basis, item.betas, item.step)
        if both:
            self._moments_to_all(averaged, wire)
        elif plan.average_exp_avg:
            self._moments_to_all(averaged[:1], wire)  # it is to be equal on all replicas

    def _bases_to_all(self, bucket: Sequence[Fragment], owned: Owned, wire: ReplicaWire) -> None:
        """What this shard keeps of them, and the other replicas' same shards."""
        places = [i for i, item in enumerate(bucket) if item.plan.low_rank and item.has_basis]
        if not places:
            return
        vectors, place_of = [bucket[i].basis.view(-1) for i in places], {i: place for place, i in enumerate(places)}
        owners = [
            [Segment(place_of[s.item], 0, vectors[place_of[s.item]].numel()) for s in segments if s.item in place_of]
            for segments in owned
        ]
        mine = [vectors[segment.item] for segment in owners[wire.index]]
        self.exact.to_all(torch.cat([vectors[0].new_empty(0), *mine]), vectors, owners, wire, "basis")


def _moments(item: Fragment) -> tuple[Tensor, Tensor]:
    return item.state["exp_avg"], item.state["exp_avg_sq"]


def _owners_of(bucket: Sequence[Fragment], owned: Owned, chosen: Averaged) -> list[list[Segment]]:
    """The segments of every owner in the moments of what it owns: all of a matrix's, else the same elements."""
    of_item: dict[int, list[int]] = {}
    for vector, (place, _, _) in enumerate(chosen):
        of_item.setdefault(place, []).append(vector)
    return [
        [
            Segment(vector, 0, chosen[vector][1].numel())
            if bucket[segment.item].plan.low_rank
            else Segment(vector, segment.start, segment.stop)
            for segment in segments
            for vector in of_item.get(segment.item, ())
        ]
        for segments in owned
    ]
