"""Tiles, border rows, column slices and buckets: every element, row and column exactly where it must be."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lordo_ds.core.fragments import MatrixShards, bucket_bounds, tiles_of


@st.composite
def matrices(draw: st.DrawFn) -> MatrixShards:
    rows, columns, shards = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    cuts = sorted(draw(st.lists(st.integers(0, rows * columns), min_size=shards - 1, max_size=shards - 1)))
    edges = [0, *cuts, rows * columns]
    intervals = [(a, b) if b > a else (0, 0) for a, b in itertools.pairwise(edges)]
    return MatrixShards((rows, columns), draw(st.booleans()), tuple(draw(st.permutations(intervals))))


@settings(deadline=None)
@given(matrices())
def test_every_element_is_in_exactly_one_tile_and_tiles_are_contiguous(matrix: MatrixShards) -> None:
    rows, columns = matrix.shape
    whole = torch.arange(rows * columns)
    seen = torch.zeros(rows, columns, dtype=torch.int64)
    for shard, (start, stop) in enumerate(matrix.intervals):
        fragment = whole[start:stop]
        tiles = matrix.tiles(shard)
        assert len(tiles) <= 3
        assert [tile.offset for tile in tiles] == [sum(t.numel for t in tiles[:i]) for i in range(len(tiles))]
        assert sum(tile.numel for tile in tiles) == stop - start
        for tile in tiles:
            block = (slice(tile.row_start, tile.row_stop), slice(tile.col_start, tile.col_stop))
            seen[block] += 1
            assert torch.equal(tile.view(fragment), whole.view(rows, columns)[block])
    assert bool((seen == 1).all())


@settings(deadline=None)
@given(matrices())
def test_border_rows_are_those_that_several_shards_hold_parts_of(matrix: MatrixShards) -> None:
    holders = Counter(row for shard in range(matrix.shards) for row in range(*matrix.rows(shard)))
    assert matrix.border_rows == tuple(sorted(row for row, count in holders.items() if count > 1))
    for shard in range(matrix.shards):
        for index, row in matrix.borders(shard):
            assert matrix.border_rows[index] == row and row in range(*matrix.rows(shard))


@settings(deadline=None)
@given(matrices())
def test_every_row_has_one_owner_which_holds_its_first_element(matrix: MatrixShards) -> None:
    owned = [row for shard in range(matrix.shards) for row in range(*matrix.owned_rows(shard))]
    assert sorted(owned) == list(range(matrix.shape[0]))
    for shard, (start, stop) in enumerate(matrix.intervals):
        for row in range(*matrix.owned_rows(shard)):
            assert start <= row * matrix.shape[1] < stop


@settings(deadline=None)
@given(matrices())
def test_moments_of_every_column_are_kept_by_exactly_one_shard_where_the_basis_is_on_rows(matrix: MatrixShards) -> None:
    kept = [column for shard in range(matrix.shards) for column in range(*matrix.moment_columns(shard))]
    if matrix.basis_on_rows:
        assert kept == list(range(matrix.shape[1]))
        assert matrix.slice_width * matrix.shards >= matrix.shape[1]
    else:
        assert set(kept) == set(range(matrix.shape[0]))
        assert len(kept) - matrix.shape[0] <= matrix.shards - 1  # border rows are kept twice


def test_a_fragment_is_a_tail_whole_rows_and_a_head() -> None:
    tiles = tiles_of(5, (3, 17))
    assert [(t.row_start, t.row_stop, t.col_start, t.col_stop) for t in tiles] == [
        (0, 1, 3, 5),
        (1, 3, 0, 5),
        (3, 4, 0, 2),
    ]


@pytest.mark.parametrize("intervals", [((0, 5), (6, 12)), ((0, 7), (6, 12)), ((0, 6), (6, 11)), ((1, 6), (6, 12))])
def test_intervals_that_leave_out_or_repeat_elements_are_refused(intervals: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="do not cover a matrix"):
        MatrixShards((3, 4), False, intervals)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 40))
def test_buckets_hold_every_parameter_once_in_order_and_stay_small(numels: list[int], limit: int) -> None:
    bounds = bucket_bounds(numels, limit)
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(len(numels)))
    for start, stop in bounds:
        assert sum(numels[start:stop]) <= limit or stop - start == 1
