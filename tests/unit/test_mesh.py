"""Replicas are runs of data-parallel ranks; ranks at the same place in them hold the same shard."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lordo_ds.core.mesh import replica_layout
from lordo_ds.errors import ConfigError


def test_four_ranks_in_two_replicas_of_two() -> None:
    layout = replica_layout(range(4), 2, ranks_per_node=4)
    assert layout.replicas == ((0, 1), (2, 3))
    assert (layout.replica_count, layout.replica_size) == (2, 2)
    assert layout.position(3) == (1, 1)
    assert layout.shard_group(2) == (2, 3)
    assert layout.replica_group(2) == (0, 2)


def test_all_ranks_can_form_one_replica_or_those_of_each_node_one() -> None:
    assert replica_layout(range(4), "all", 2).replicas == ((0, 1, 2, 3),)
    assert replica_layout(range(4), "node", 2).replicas == ((0, 1), (2, 3))


def test_the_ranks_need_not_be_consecutive_numbers() -> None:
    """Under tensor parallelism of two, a data-parallel group is every other rank."""
    layout = replica_layout([1, 3, 5, 7], 2, 4)
    assert layout.replicas == ((1, 3), (5, 7))
    assert layout.position(5) == (1, 0) and layout.replica_group(7) == (3, 7)


def test_a_rank_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="dist_rank 9"):
        replica_layout(range(4), 2, 4).position(9)


@pytest.mark.parametrize(
    ("total", "size", "per_node", "nearest"),
    [(8, 3, 8, 2), (6, 5, 6, 6), (4, 8, 4, 4), (6, "node", 4, 3), (2, 64, 2, 2)],
)
def test_a_size_that_does_not_divide_is_refused_with_the_nearest_that_does(
    total: int, size: int | str, per_node: int, nearest: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        replica_layout(range(total), size, per_node)
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"replica_size = {size!r}", f"data-parallel size {total}", f"(nearest: {nearest})"):
        assert part in message


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 6), size=st.integers(1, 6), first=st.integers(0, 3), stride=st.integers(1, 3))
def test_every_rank_is_in_exactly_one_place(count: int, size: int, first: int, stride: int) -> None:
    ranks = range(first, first + count * size * stride, stride)
    layout = replica_layout(ranks, size, len(ranks))
    assert [layout.position(rank) for rank in ranks] == [(m, i) for m in range(count) for i in range(size)]
    for rank in ranks:
        replica, shard = layout.position(rank)
        assert layout.shard_group(rank)[shard] == layout.replica_group(rank)[replica] == rank
