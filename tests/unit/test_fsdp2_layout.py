"""Where `fully_shard` and tensor parallelism put the elements of a parameter, as plain values."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lordo_ds import ConfigError
from lordo_ds.adapters.fsdp2.layout import dims_of_mesh, shard_intervals, sliced_facts
from lordo_ds.core.grouping import ParameterFacts

LINES = {"replica": (1, 5), "shard": (0, 1), "tensor": (1, 3)}  # of rank 1


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 7))
def test_shards_hold_the_rows_that_torch_chunks(shape: list[int], shards: int) -> None:
    """All elements once, in order, and nothing on the last ones where there are fewer rows."""
    fact = ParameterFacts("w", tuple(shape))
    intervals = shard_intervals(fact, {"shard": Shard(0)}, shards)
    chunks = torch.arange(prod(shape)).view(shape).chunk(shards)
    expected = [tuple(chunk.flatten()[[0, -1]].tolist()) for chunk in chunks]
    assert len(intervals) == shards
    assert [(start, stop - 1) for start, stop in intervals[: len(chunks)]] == expected
    assert set(intervals[len(chunks) :]) <= {(0, 0)}


@pytest.mark.parametrize(
    ("placement", "shape", "dim", "partitions"),
    [(Shard(0), (4, 6), 0, 2), (Shard(1), (8, 3), 1, 2), (Replicate(), (8, 6), None, 1), (None, (8, 6), None, 1)],
)
def test_a_slice_knows_the_side_that_is_cut(
    placement: object, shape: tuple[int, int], dim: int | None, partitions: int
) -> None:
    placements = {} if placement is None else {"tensor": placement}
    found = sliced_facts(ParameterFacts("w", (8, 6)), placements, 2)
    assert (found.shape, found.partition_dim, found.partitions) == (shape, dim, partitions)


def test_a_strided_shard_cuts_the_slice() -> None:
    fact = sliced_facts(ParameterFacts("w", (10, 3)), {"tensor": Shard(0)}, 2)
    placements = {"shard": _StridedShard(0, split_factor=2), "tensor": Shard(0)}
    assert shard_intervals(fact, placements, 2) == ((0, 9), (9, 15))


@pytest.mark.parametrize(
    ("placements", "words"),
    [
        ({}, "w is not sharded over the 2 shards of a replica"),
        ({"shard": Replicate()}, "w is not sharded over the 2 shards of a replica"),
        ({"shard": Shard(1)}, "w is sharded along dimension 1: only the first one, 0, is supported"),
        ({"shard": Shard(0), "tensor": Partial()}, "w is Partial(sum) over the tensor-parallel ranks"),
        ({"shard": Shard(0), "tensor": Shard(1)}, "dimension 1 of w (8, 7) is sliced over 2"),
    ],
)
def test_what_is_cut_otherwise_is_refused(placements: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shard_intervals(sliced_facts(ParameterFacts("w", (8, 7)), placements, 2), placements, 2)
    assert words in str(caught.value)


def test_a_mesh_is_known_by_its_ranks() -> None:
    """Its names help only where both dimensions have this rank alone."""
    assert dims_of_mesh("w", [("a", (0, 1)), ("b", (1, 3))], LINES) == ["shard", "tensor"]
    assert dims_of_mesh("w", [("", (1, 3))], LINES) == ["tensor"]
    alone = {"replica": (1, 5), "shard": (1,), "tensor": (1,)}
    assert dims_of_mesh("w", [("tensor", (1,))], alone) == ["tensor"]
    assert dims_of_mesh("w", [("", (1,)), ("", (1,))], alone) == ["shard", "tensor"]
    for ranks, words in (
        ((1, 5), "ranks [1, 5] belong to 2 replicas"),
        ((1, 2), "[1, 2] are neither the shards [0, 1]"),
    ):
        with pytest.raises(ConfigError) as caught:
            dims_of_mesh("w", [("shard", ranks)], LINES)
        assert words in str(caught.value)
