"""The state of a whole parameter, from the parts that shards and tensor slices keep of it, and back.

It is kept in five ways:

    weight, anchor, outer_momentum, error,     one value per element; of dense parameters the moments too
    wire_error
    owner_momentum, owner_error                likewise, of the elements that the replica owns; zero elsewhere
    exp_avg, exp_avg_sq (r, l)                 by columns: those of the elements a shard holds, or an equal share
    col_mean_sq (l,)                           likewise
    basis (s, r), row_mean_sq (s,)             by rows of the basis; equal on all tensor slices, which cut l

r is the rank, s the side of the basis, l the other one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lordo_ds.checkpoint.bounds import is_held
from lordo_ds.checkpoint.header import LARGEST, FragmentLayout
from lordo_ds.core.fragments import Interval, MatrixShards
from lordo_ds.core.slices import cut_slice, join_slices
from lordo_ds.core.state import BY_NAME, KEPT, OWNED, PLAIN_VALUES, required
from lordo_ds.errors import CheckpointError

State = dict[str, Any]
_BY_COLUMNS = {kept.name: dim for kept in KEPT if (dim := kept.dim("l")) is not None}  # which dimension l is
_BY_BASIS_ROWS = tuple(kept.name for kept in KEPT if "s" in kept.axes)


@dataclass(frozen=True)
class Place:
    """Where one rank keeps its part of a parameter: `intervals` of all shards, tensor slice `slice`."""

    layout: FragmentLayout
    intervals: tuple[Interval, ...]
    shard: int = 0
    slice: int = 0

    @property
    def numel(self) -> int:
        return self.layout.numel

    @property
    def shards(self) -> MatrixShards:
        rows, columns = self.layout.shape
        return _shards((rows, columns), self.layout.side == "rows", self.intervals)

    def span(self, key: str) -> tuple[int, int, int]:
        """(dimension, start, stop) of the slice's tensor that this shard keeps; flat elements are dimension -1."""
        if key in OWNED:
            return -1, *self.layout.owned
        if not self.layout.low_rank or key not in (*_BY_COLUMNS, *_BY_BASIS_ROWS):
            return -1, *self.intervals[self.shard]
        if key in _BY_COLUMNS:
            return _BY_COLUMNS[key], *self.shards.moment_columns(self.shard)
        first, last = self.shards.rows(self.shard)
        if not self.shards.basis_on_rows:
            first, last = 0, self.layout.shape[1] if last > first else 0
        return 0, first, last

    def slice_shape(self, key: str) -> tuple[int, ...]:
        """Of what all shards of this tensor slice keep together."""
        layout = self.layout
        if not layout.low_rank or key not in (*_BY_COLUMNS, *_BY_BASIS_ROWS):
            return layout.shape
        other, side = layout.shape if layout.side == "columns" else layout.shape[::-1]
        length = {"s": side, "l": other, "r": layout.rank}
        return tuple(length[axis] for axis in BY_NAME[key].axes)


@lru_cache(maxsize=64)
def _shards(shape: tuple[int, int], basis_on_rows: bool, intervals: tuple[Interval, ...]) -> MatrixShards:
    try:
        return MatrixShards(shape, basis_on_rows, intervals)
    except ValueError as error:
        raise CheckpointError(f"LoRDO: {error}: the checkpoint is damaged") from None


def part_shape(key: str, place: Place) -> tuple[int, ...]:
    """Of what one rank keeps under that name."""
    dim, start, stop = place.span(key)
    shape = list(place.slice_shape(key))
    if dim < 0:
        return (stop - start,)
    shape[dim] = stop - start
    return tuple(shape)


def check_part(saved: Mapping[str, Any], place: Place, where: str) -> None:
    """Refuse a rank's saved state that lacks something, or has something of another size. Reads no tensor.

    Raises:
        CheckpointError: naming the parameter and the entry.
    """
    layout = place.layout
    for key in required(layout.low_rank):
        if key not in saved:
            raise CheckpointError(f"LoRDO: {where}: the state of {layout.name} has no {key!r}: it is damaged")
    for key, value in saved.items():
        if isinstance(value, Tensor) and not is_held(value):
            raise CheckpointError(f"LoRDO: {where}: {key!r} of {layout.name} is larger than its file: it is damaged")
        if key in PLAIN_VALUES:
            check_plain(key, value, layout.name, where)
            continue
        wanted = part_shape(key, place)
        found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        # Flat ones may be kept in the parameter's shape. A transposed one has as many elements.
        shapes = (wanted, layout.shape) if place.span(key)[0] < 0 else (wanted,)
        if (
            not isinstance(value, Tensor)
            or not value.is_floating_point()
            or (tuple(value.shape) not in shapes or value.numel() != torch.Size(wanted).numel())
        ):
            raise CheckpointError(f"LoRDO: {where}: {key!r} of {layout.name} is {found}, not {wanted}: it is damaged")


def check_plain(key: str, value: Any, name: str, where: str) -> None:
    """Refuse a count that is none.

    Raises:
        CheckpointError: naming it.
    """
    if type(value) is not PLAIN_VALUES[key] or (isinstance(value, int) and not 0 <= value <= LARGEST):
        shown = repr(value)[:40] if isinstance(value, (int, float, str)) else type(value).__name__
        raise CheckpointError(f"LoRDO: {where}: {key!r} of {name} is {shown}: it is damaged")


def slicing_dim(key: str, layout: FragmentLayout) -> int | None:
    """Along which dimension tensor parallelism cuts the whole tensor of that name; None: every slice has all of it."""
    if layout.partitions == 1 or (layout.low_rank and key in _BY_BASIS_ROWS):
        return None
    return _BY_COLUMNS[key] if layout.low_rank and key in _BY_COLUMNS else layout.partition_dim


def join_shards(key: str, places: Sequence[Place], parts: Sequence[Tensor]) -> Tensor:
    """One tensor slice's tensor from what its shards keep; rows and columns that several keep are equal on them.

    Raises:
        CheckpointError: a part has another size than its place, or the parts leave a gap.
    """
    shape, name = places[0].slice_shape(key), places[0].layout.name
    covered = 0
    for place, part in zip(places, parts, strict=True):  # before room is made for what they do not hold
        wanted = part_shape(key, place)
        if part.numel() != math.prod(wanted) or not is_held(part):
            raise CheckpointError(f"LoRDO: {key!r} of {name}: a shard keeps {tuple(part.shape)}, not {wanted}")
        _, start, stop = place.span(key)
        covered += stop - start
    dim = places[0].span(key)[0]
    extent = math.prod(shape) if dim < 0 else shape[dim]
    if covered < extent and key not in OWNED:
        raise CheckpointError(f"LoRDO: {key!r} of {name}: its shards hold {covered} of {extent} parts")
    if len(parts) == 1 and parts[0].numel() == math.prod(shape):
        return parts[0].view(shape)
    whole = parts[0].new_zeros(shape)
    for place, part in zip(places, parts, strict=True):
        _, start, stop = place.span(key)
        target = whole.view(-1)[start:stop] if dim < 0 else whole.narrow(dim, start, stop - start)
        target.copy_(part.view(target.shape))
    return whole


def join(key: str, slices: Sequence[tuple[Sequence[Place], Sequence[Tensor]]]) -> Tensor:
    """A whole parameter's tensor from its tensor slices, each a list of shards."""
    layout = slices[0][0][0].layout
    dim = slicing_dim(key, layout)
    if dim is None:
        slices = slices[:1]
    return join_slices([join_shards(key, *one) for one in slices], dim, layout.partition_stride)


def cut(key: str, whole: Tensor, place: Place) -> Tensor:
    """What one rank keeps of a whole parameter's tensor; a view where it can be.

    Raises:
        CheckpointError: the tensor has not the parameter's shape.
    """
    layout = place.layout
    dim = slicing_dim(key, layout)
    part = cut_slice(whole, dim, layout.partition_stride, place.slice, layout.partitions)
    if tuple(part.shape) != place.slice_shape(key):
        raise CheckpointError(
            f"LoRDO: {key!r} of {layout.name} is {tuple(whole.shape)}, and its slice {tuple(part.shape)} is not "
            f"{place.slice_shape(key)}"
        )
    dim, start, stop = place.span(key)
    return part.reshape(-1)[start:stop] if dim < 0 else part.narrow(dim, start, stop - start)
