"""How many parameters the whole model has, of both kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.replica.fragment import Fragment


@dataclass(frozen=True)
class ModelSize:
    """Parameters of the whole model, of all stages and slices, every one counted once; and their elements."""

    low_rank_parameters: int = 0
    low_rank_elements: int = 0
    dense_parameters: int = 0
    dense_elements: int = 0


def model_size(fragments: Sequence[Fragment], inside: InsideReplica) -> ModelSize:
    """Of the parameters that the ranks of this replica hold parts of. Collective over them."""
    first_of_its_shards = inside.shard.index == inside.rows.index == 0
    counted = [fragment.plan for fragment in fragments if fragment.counts and first_of_its_shards]
    # A sliced parameter is one, its elements lie on all tensor indices.
    sizes = inside.of_every_rank([(p.low_rank, int(inside.tensor.index == 0), p.numel) for p in counted])
    low_rank, dense = ([size[1:] for size in sizes if size[0] == kind] for kind in (True, False))
    return ModelSize(
        sum(one for one, _ in low_rank),
        sum(numel for _, numel in low_rank),
        sum(one for one, _ in dense),
        sum(numel for _, numel in dense),
    )
