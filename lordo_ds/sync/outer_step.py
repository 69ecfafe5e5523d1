"""The outer step: from the averaged pseudo-gradient to this rank's weights.

Orthogonalizing needs a matrix as one. ZeRO's cuts rarely leave it so: each matrix is put together on one shard, its
owner, and goes back from there in pieces. The owners divide the work, and nobody else ever holds the matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import Interval
from lordo_ds.core.outer import orthogonalized, outer_update
from lordo_ds.core.schedule import SyncPlan
from lordo_ds.costs import orthogonalization_flops
from lordo_ds.replica.fragment import Fragment


class OuterStep:
    """W = anchor - outer(D); anchor = W, for the parameters of one bucket at a time."""

    def __init__(self, config: LordoConfig, inside: InsideReplica) -> None:
        self.outer, self.inside = config.outer, inside

    def run_(self, items: Sequence[Fragment], means: Sequence[Tensor], plan: SyncPlan, replicas: int) -> None:
        """Collective over the shards, and the ranks that hold the other slices of their matrices.

        Args:
            items: with anchors.
            means: D of each, averaged over replicas; left as they are.
        """
        if replicas == 1 and plan.plain_average:  # one replica's plain average is its own weights, untouched
            for item in items:
                item.state["anchor"].copy_(item.weight)
        elif plan.plain_average:
            self.apply_(items, means)
        else:
            self.apply_(items, self.updates(items, means, [item.state["outer_momentum"] for item in items]))

    def apply_(self, items: Sequence[Fragment], updates: Sequence[Tensor]) -> None:
        """W = anchor - update; anchor = W."""
        for item, update in zip(items, updates, strict=True):
            item.weight.copy_(item.state["anchor"])
            item.weight.sub_(update)
            item.state["anchor"].copy_(item.weight)

    def updates(self, items: Sequence[Fragment], means: Sequence[Tensor], momenta: Sequence[Tensor]) -> list[Tensor]:
        """outer(D) of each, where it is no plain average. Collective as `run_`.

        Args:
            means: of a dense parameter also of a part of its elements.
            momenta: of as many elements; updated.
        """
        updates = []
        for item, mean, momentum in zip(items, means, momenta, strict=True):
            if self.outer.residual_gain != 1.0 and item.has_basis:
                mean = with_residual_gain(item, mean, self.outer.residual_gain)
            updates.append(outer_update(mean, momentum, self.outer))
        if self.outer.orthogonalize:
            matrices = [i for i, item in enumerate(items) if item.plan.low_rank]
            results = self._orthogonalized([items[i] for i in matrices], [updates[i] for i in matrices])
            for i, result in zip(matrices, results, strict=True):
                updates[i] = result
        return updates

    def _orthogonalized(self, items: list[Fragment], updates: list[Tensor]) -> list[Tensor]:
        """This rank's elements of the matrices whose elements it holds now, orthogonalized."""
        shard = self.inside.shard
        held = [item.intervals for item in items]
        # Of one iteration; they all cost the same.
        flops = [orthogonalization_flops(item.plan.basis_side, item.plan.other_side, iterations=1) for item in items]
        owners = matrix_owners(flops, held)
        own = [i for i, owner in enumerate(owners) if owner == shard.index]
        ranks = range(shard.size)
        travel = [i for i, owner in enumerate(owners) if any(_length(held[i][r]) for r in ranks if r != owner)]
        guests = [i for i in own if i in travel]

        whole = {i: updates[i] for i in own if i not in travel}
        if travel:  # known to all shards alike
            parts = [[updates[i] for i in travel if owners[i] == rank] for rank in ranks]
            arriving = [[_length(held[i][rank]) for i in guests] for rank in ranks]
            pieces = shard.exchange(parts, arriving, updates[0], "outer")
            for position, i in enumerate(guests):
                whole[i] = _joined([pieces[rank][position] for rank in ranks], held[i])
            del parts, pieces
        done = {i: self._orthogonalized_whole(items[i], whole.pop(i)) for i in own}
        if travel:
            parts = [[done[i][slice(*held[i][rank])] for i in guests] for rank in ranks]
            arriving = [[items[i].numel for i in travel if owners[i] == rank] for rank in ranks]
            pieces = shard.exchange(parts, arriving, updates[0], "outer")
            for rank in ranks:
                done |= dict(zip((i for i in travel if owners[i] == rank), pieces[rank], strict=True))
        return [done.get(i, updates[i]) for i in range(len(items))]

    def _orthogonalized_whole(self, item: Fragment, elements: Tensor) -> Tensor:
        """Computed on the accelerator, also where the optimizer's state is offloaded."""
        plan = item.plan
        matrix = plan.orient(elements.view(plan.shape)).to(self.inside.device)
        result = orthogonalized(matrix, lambda part: item.slices.sum_(part, "outer"))
        return plan.orient(result).to(elements.device).reshape(-1)


def with_residual_gain(item: Fragment, elements: Tensor, gain: float) -> Tensor:
    """Q Q^T D + gain (I - Q Q^T) D on this rank's elements of D. Only coordinates (r, l) cross the shards."""
    plan = item.plan
    coordinates = elements.new_zeros(plan.rank, plan.other_side)
    for tile in item.tiles:
        coordinates[:, tile.l_whole].addmm_(item.basis[tile.s].mT, tile.view(elements))
    item.comm.sum_(coordinates, "outer")
    gained = elements * gain
    for tile in item.tiles:
        tile.view(gained).addmm_(item.basis[tile.s], coordinates[:, tile.l_whole], alpha=1.0 - gain)
    return gained


def matrix_owners(costs: Sequence[int], held: Sequence[Sequence[Interval]]) -> list[int]:
    """The shard that works on each matrix: one that holds about the most of it, up to a fair share of the work.

    What is more than that goes to whoever has the least to do: a dense embedding may fill one shard at ZeRO 1 and 2 and
    leave all matrices to the others.

    Args:
        costs: of each matrix.
        held: each matrix's elements [start, stop) on every shard.
    """
    if not costs:
        return []
    owners, busy, left = [0] * len(costs), [0] * len(held[0]), []
    share = sum(costs) / len(busy)

    def give(i: int, ranks: Iterable[int]) -> None:
        owners[i] = min(ranks, key=lambda rank: (busy[rank], rank))
        busy[owners[i]] += costs[i]

    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lengths = [_length(interval) for interval in held[i]]
        holders = [rank for rank, length in enumerate(lengths) if 2 * length >= max(lengths)]
        if min(busy[rank] for rank in holders) + costs[i] / 2 <= share:
            give(i, holders)
        else:
            left.append(i)
    for i in left:
        give(i, range(len(busy)))
    return owners


def _length(interval: Interval) -> int:
    return max(0, interval[1] - interval[0])


def _joined(pieces: Sequence[Tensor], intervals: Sequence[Interval]) -> Tensor:
    """The elements of all shards in the parameter's order."""
    order = sorted(range(len(pieces)), key=lambda rank: intervals[rank][0])
    return torch.cat([pieces[rank] for rank in order if pieces[rank].numel()])
