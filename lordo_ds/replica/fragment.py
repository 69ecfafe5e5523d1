"""A parameter's fragment on this rank: its elements, its state, and its place among the shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideComm, InsideReplica
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import Interval, MatrixShards, Tile
from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.core.local import local_part
from lordo_ds.core.state import MOMENTS, WIRE_ERRORS, Kept
from lordo_ds.costs import Holding
from lordo_ds.replica.waiting import Waiting

_ERROR_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class OrientedTile:
    """A tile with its basis side first, and where it lies.

    `s` and `l` index the local basis rows and the local columns of coordinates; `s_whole` and `l_whole` the
    whole matrix.
    """

    tile: Tile
    transposed: bool
    s: slice
    l: slice  # noqa: E741
    s_whole: slice
    l_whole: slice

    def view(self, fragment: Tensor) -> Tensor:
        """The tile of a flat fragment, (s, l), a view."""
        matrix = self.tile.view(fragment)
        return matrix.mT if self.transposed else matrix


class Fragment:
    """One parameter on this rank: `numel` consecutive elements of it, none included.

    `weight` is the slice of the tensor that the optimizer steps; `waiting` is what its step sets aside for the end of
    the same attempted step.
    """

    def __init__(
        self,
        plan: ParameterPlan,
        tensor: Tensor,
        offset: int,
        intervals: tuple[Interval, ...],
        inside: InsideReplica,
        state: dict[str, Any],
        group: dict[str, Any],
        tied_copy: bool = False,
    ) -> None:
        self.plan, self.inside, self.comm, self.state, self.group = plan, inside, inside.shard, state, group
        self._tensor, self.offset, self.tied_copy = tensor, offset, tied_copy
        # Copies on several tensor indices or pipeline stages are stepped alike; one of them counts.
        self.duplicated = inside.tensor.size > 1 and plan.partitions == 1
        self.counts = not tied_copy and (not self.duplicated or inside.tensor.index == 0)
        start, stop = intervals[self.comm.index]
        self.numel = stop - start
        self.intervals = intervals
        self.owned: Interval = (0, 0)  # of these elements, those that this replica owns
        self.waiting = Waiting()
        self.shards: MatrixShards | None = None
        self.tiles: tuple[OrientedTile, ...] = ()
        if plan.low_rank:
            rows, columns = plan.shape
            self.shards = MatrixShards((rows, columns), plan.side == "rows", intervals)
            self.tiles = tuple(self._orient(tile) for tile in self.shards.tiles(self.comm.index))

    # -- elements ------------------------------------------------------------------------------------

    @property
    def betas(self) -> tuple[float, float]:
        """Of its parameter group, where schedules and loaded states may change them."""
        first, second = self.group["betas"]
        return float(first), float(second)

    def slice_of(self, tensor: Tensor) -> Tensor:
        """This fragment's elements of a tensor laid out like the one that is stepped: (numel,)."""
        return local_part(tensor).reshape(-1)[self.offset : self.offset + self.numel]

    @property
    def weight(self) -> Tensor:
        return local_part(self._tensor).detach().view(-1)[self.offset : self.offset + self.numel]

    @property
    def tensor_shape(self) -> torch.Size:
        """Of the tensor that is stepped, which may hold other parameters too."""
        return self._tensor.shape

    @property
    def token(self) -> object:
        """The same as before, unless somebody has written to the stepped tensor openly."""
        part = local_part(self._tensor)
        return self._tensor._version, part._version, part.data_ptr()

    @property
    def steps_whole_parameter(self) -> bool:
        """Whether the stepped tensor is the parameter itself (or its master), not a flat tensor of several."""
        return tuple(self._tensor.shape) == self.plan.shape and self._tensor.dim() > 1

    def _orient(self, tile: Tile) -> OrientedTile:
        assert self.shards is not None
        first = self.shards.rows(self.comm.index)[0]
        local_rows = slice(tile.row_start - first, tile.row_stop - first)
        rows, columns = slice(tile.row_start, tile.row_stop), slice(tile.col_start, tile.col_stop)
        if self.shards.basis_on_rows:
            return OrientedTile(tile, False, local_rows, columns, rows, columns)
        return OrientedTile(tile, True, columns, local_rows, columns, rows)

    @property
    def holding(self) -> Holding:
        """What its costs follow from."""
        width = self._tensor.element_size()
        return Holding(self.plan, self.intervals, self.comm.index, width, self.has_basis, self.owned)

    # -- state ---------------------------------------------------------------------------------------

    def allocate(self, config: LordoConfig) -> None:
        """Zero state in `state`: moments (r, kept columns), basis rows, and what the settings ask for."""
        like = self.weight
        self.state.update(step=0)
        if self.shards is None:
            self.state.update(exp_avg=torch.zeros_like(like), exp_avg_sq=torch.zeros_like(like))
            return
        first, last = self.shards.moment_columns(self.comm.index)
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[name] = like.new_zeros(self.plan.rank, last - first)
        self.state["basis"] = like.new_zeros(self.basis_rows, self.plan.rank)
        self.state["has_basis"] = False
        if config.error_feedback:
            dtype = like.dtype if like.dtype == torch.float64 else _ERROR_DTYPES[config.error_feedback]
            self.state["error"] = torch.zeros_like(like, dtype=dtype)
        if config.qh_mode == "factored":
            self.state["row_mean_sq"] = like.new_zeros(self.basis_rows)
            self.state["col_mean_sq"] = like.new_zeros(last - first)

    @property
    def basis_rows(self) -> int:
        """Rows of the basis that this rank keeps: those its tiles touch, all of them for a basis on columns."""
        assert self.shards is not None
        first, last = self.shards.rows(self.comm.index)
        if self.shards.basis_on_rows:
            return last - first
        return self.plan.basis_side if last > first else 0

    @property
    def coordinate_columns(self) -> int:
        """Columns of coordinates that this rank's tiles touch."""
        assert self.shards is not None
        first, last = self.shards.rows(self.comm.index)
        return self.plan.other_side if self.shards.basis_on_rows else last - first

    @cached_property
    def border_rows(self) -> tuple[int, ...]:
        """Rows that several shards hold parts of."""
        return () if self.shards is None else self.shards.border_rows

    @cached_property
    def border_places(self) -> tuple[Tensor, Tensor]:
        """Indices among the border rows, and local row indices, of those this rank holds parts of."""
        assert self.shards is not None
        first = self.shards.rows(self.comm.index)[0]
        pairs = [(index, row - first) for index, row in self.shards.borders(self.comm.index)]
        index, local = torch.tensor(pairs, dtype=torch.int64, device=self.weight.device).view(-1, 2).unbind(1)
        return index, local

    @property
    def has_basis(self) -> bool:
        return bool(self.state.get("has_basis", False))

    @property
    def basis(self) -> Tensor:
        """This rank's rows of Q; zero before the first one."""
        basis: Tensor = self.state["basis"]
        return basis

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def error(self) -> Tensor | None:
        return self.state.get("error")

    def moments(self) -> Iterator[tuple[Kept, Tensor, float]]:
        """(its row in the table, tensor, its beta) of every running average."""
        for kept in MOMENTS:
            if kept.beta is not None and kept.name in self.state:
                yield kept, self.state[kept.name], self.betas[kept.beta]

    def forget_errors_(self) -> None:
        """What was kept back to be added later belongs to weights that are no more."""
        for name in ("error", *WIRE_ERRORS):
            if name in self.state:
                self.state[name].zero_()

    @property
    def slices(self) -> InsideComm:
        """The ranks that hold the other tensor-parallel slices of this matrix."""
        return self.inside.tensor if self.plan.partitions > 1 else InsideComm()

    def publish_(self, tensor: Tensor) -> Tensor:
        """Give every rank of the replica that holds a part or a copy of the parameter the first one's value."""
        self.inside.tensor.broadcast_(tensor, "basis")
        return self.comm.broadcast_(tensor, "basis")

    # -- the whole basis -----------------------------------------------------------------------------

    def whole_basis(self) -> Tensor:
        """Q, (s, r), assembled from the shards. Collective over them, like everything below."""
        assert self.shards is not None
        if not self.shards.basis_on_rows:
            if self.comm.size == 1 or all(stop > start for start, stop in self.intervals):
                return self.basis
            holder = next(i for i, (start, stop) in enumerate(self.intervals) if stop > start)
            whole = self.weight.new_zeros(self.plan.basis_side, self.plan.rank)
            if self.numel:
                whole.copy_(self.basis)
            return self.comm.broadcast_(whole, "basis", holder)
        if self.comm.size == 1:
            return self.basis
        # (s, r): each row from the shard that owns it, zero elsewhere, so that the sum joins them
        whole = self.weight.new_zeros(self.plan.basis_side, self.plan.rank)
        first = self.shards.rows(self.comm.index)[0]
        own_first, own_last = self.shards.owned_rows(self.comm.index)
        whole[own_first:own_last] = self.basis[own_first - first : own_last - first]
        return self.comm.sum_(whole, "basis")

    def store_basis(self, whole: Tensor) -> None:
        """Keep this rank's rows of a whole basis."""
        assert self.shards is not None
        if self.basis_rows:
            first, last = self.shards.rows(self.comm.index) if self.shards.basis_on_rows else (0, self.plan.basis_side)
            self.basis.copy_(whole[first:last])  # (s, r) -> (basis rows, r)
        self.state["has_basis"] = True

    # -- a whole matrix ------------------------------------------------------------------------------

    def whole_matrix(self, elements: Tensor) -> Tensor:
        """The matrix (s, l) of elements laid out like the fragment; of tensor slices, this one's columns."""
        if self.comm.size == 1:
            return self.plan.orient(elements.view(self.plan.shape))
        whole = elements.new_zeros(self.plan.basis_side, self.plan.other_side)  # (s, l); shards' tiles do not overlap
        for tile in self.tiles:
            whole[tile.s_whole, tile.l_whole] = tile.view(elements)
        return self.comm.sum_(whole, "basis")
