"""Flat intervals of a matrix and the tiles, border rows and column slices they mean. Integers only.

ZeRO hands the optimizer flat slices that cut through rows. An interval of a row-major matrix is at most three
rectangles that are contiguous in memory: the tail of a row, whole rows, the head of a row. Everything that is
done to a fragment is done to these tiles, as views, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lordo_ds.core.grouping import ParameterFacts

Interval = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """One parameter inside a flat tensor.

    `intervals` holds, per shard index, the elements [start, stop) of the parameter's row-major order that the
    shard holds, (0, 0) where it holds none. `offset` is where this rank's interval starts in the flat tensor.
    """

    facts: ParameterFacts
    intervals: tuple[Interval, ...]
    offset: int = 0


@dataclass(frozen=True)
class FlatTensor:
    """One tensor that the base optimizer steps, and every parameter of its group in one canonical order.

    Of a DTensor it is the part on this rank that offsets count in.
    The order is equal on all ranks of the shard group; parameters that this rank holds nothing of are listed too.
    """

    tensor: Tensor
    pieces: tuple[Piece, ...]

    @classmethod
    def of_one(cls, tensor: Tensor, facts: ParameterFacts) -> FlatTensor:
        """A tensor that is one parameter, held whole."""
        return cls(tensor, (Piece(facts, whole(facts.shape)),))


@dataclass(frozen=True)
class Tile:
    """A rectangle of a matrix that is contiguous in a fragment, from `offset` elements after its start."""

    row_start: int
    row_stop: int
    col_start: int
    col_stop: int
    offset: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_stop - self.row_start, self.col_stop - self.col_start

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def view(self, fragment: Tensor) -> Tensor:
        """The tile of a flat fragment, (rows, cols), a view."""
        return fragment[self.offset : self.offset + self.numel].view(self.shape)


def tiles_of(columns: int, interval: Interval) -> tuple[Tile, ...]:
    """The tiles of the elements [start, stop) of a row-major matrix with the given number of columns."""
    tiles: list[Tile] = []
    position, stop = interval
    start = position
    while position < stop:
        row, column = divmod(position, columns)
        whole_rows = (stop - position) // columns
        if column == 0 and whole_rows > 0:
            tile = Tile(row, row + whole_rows, 0, columns, position - start)
        else:
            tile = Tile(row, row + 1, column, min(columns, column + stop - position), position - start)
        tiles.append(tile)
        position += tile.numel
    return tuple(tiles)


@dataclass(frozen=True)
class MatrixShards:
    """How the shards of one replica hold a matrix, and which part of its moments each keeps.

    The moments are (r, l) with l the side without the basis. With the basis on the columns, l counts rows: a shard
    keeps those it holds elements of, and a *border row*, which several shards hold parts of, is kept by each of them.
    With the basis on the rows, l counts columns: each shard keeps an equal slice of them, the last ones padded.
    """

    shape: tuple[int, int]
    basis_on_rows: bool
    intervals: tuple[Interval, ...]

    def __post_init__(self) -> None:
        held = sorted(interval for interval in self.intervals if interval[1] > interval[0])
        edges = [0, *(edge for interval in held for edge in interval), self.shape[0] * self.shape[1]]
        if any(a != b for a, b in zip(edges[::2], edges[1::2], strict=True)):
            raise ValueError(f"the intervals {self.intervals} do not cover a matrix {self.shape} exactly once")

    @property
    def shards(self) -> int:
        return len(self.intervals)

    def tiles(self, shard: int) -> tuple[Tile, ...]:
        return tiles_of(self.shape[1], self.intervals[shard])

    def rows(self, shard: int) -> Interval:
        """Rows [first, last) that the shard holds elements of; (0, 0) if none."""
        start, stop = self.intervals[shard]
        if stop <= start:
            return (0, 0)
        return start // self.shape[1], -(-stop // self.shape[1])

    @cached_property
    def border_rows(self) -> tuple[int, ...]:
        """Rows that two or more shards hold parts of, ascending."""
        holders: dict[int, int] = {}
        for shard in range(self.shards):
            first, last = self.rows(shard)
            for row in {first, last - 1} if last > first else ():
                holders[row] = holders.get(row, 0) + 1
        return tuple(sorted(row for row, count in holders.items() if count > 1))

    def borders(self, shard: int) -> tuple[tuple[int, int], ...]:
        """(index among the border rows, row) of the border rows that the shard holds parts of."""
        first, last = self.rows(shard)
        return tuple((i, row) for i, row in enumerate(self.border_rows) if first <= row < last)

    def owned_rows(self, shard: int) -> Interval:
        """Rows [first, last) whose first element the shard holds: a partition of all rows over the shards."""
        start, stop = self.intervals[shard]
        columns = self.shape[1]
        return -(-start // columns), -(-stop // columns)

    @property
    def slice_width(self) -> int:
        """Columns per shard, padding included, where the basis is on the rows."""
        return -(-self.shape[1] // self.shards)

    def moment_columns(self, shard: int) -> Interval:
        """The part [start, stop) of l that the shard keeps moments of."""
        if not self.basis_on_rows:
            return self.rows(shard)
        width = self.slice_width
        return min(shard * width, self.shape[1]), min((shard + 1) * width, self.shape[1])


def whole(shape: tuple[int, ...]) -> tuple[Interval, ...]:
    """The intervals of a parameter that one shard holds entirely."""
    numel = 1
    for side in shape:
        numel *= side
    return ((0, numel),)


def bucket_bounds(numels: Sequence[int], bucket_numel: int) -> list[tuple[int, int]]:
    """Consecutive runs [start, stop) of whole parameters, each of at most `bucket_numel` elements.

    A parameter larger than that is a run of its own. Every parameter is in exactly one run.
    """
    bounds, start, filled = [], 0, 0
    for index, numel in enumerate(numels):
        if index > start and filled + numel > bucket_numel:
            bounds.append((start, index))
            start, filled = index, 0
        filled += numel
    if start < len(numels):
        bounds.append((start, len(numels)))
    return bounds


def balanced_order(held: Sequence[Sequence[Interval]]) -> list[int]:
    """An order of parameters in which every stretch takes some from every shard; the given one if shards hold alike.

    ZeRO 1 and 2 give each shard a run of whole parameters. In their own order one shard after the other would be busy.

    Args:
        held: each parameter's elements [start, stop) on every shard.
    """
    filled: dict[int, int] = {}
    places = []
    for intervals in held:
        lengths = [stop - start for start, stop in intervals]
        holder = lengths.index(max(lengths))
        filled[holder] = filled.get(holder, 0) + sum(lengths)
        places.append(filled[holder])
    return sorted(range(len(places)), key=lambda i: (places[i], i))
