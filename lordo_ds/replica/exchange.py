"""What the ranks of a replica exchange in one inner step, and what of it is cut and joined on the way.

Border rows and row sums travel in one small all-reduce. Of matrices with the basis on their rows, whose coordinates run
over all columns, partial coordinates are summed by a reduce-scatter over columns; what their update needs is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideComm
from lordo_ds.core.inner import StepSettings, Update
from lordo_ds.replica.fragment import Fragment


@dataclass(eq=False)
class Work:
    """One fragment during a step.

    `lines` are coordinates, (n, columns): r of Q^T A, then r of Q^T G and one of column sums where they are asked for.
    Columns are those that this rank's tiles touch; of a matrix with the basis on its rows that is all l of them, until
    `scatter_columns` leaves this shard's slice. `row_sums` are (basis rows of this rank,).
    """

    fragment: Fragment
    gradient: Tensor
    settings: StepSettings
    lines: Tensor
    row_sums: Tensor | None
    own_gradient_lines: bool

    @property
    def rank(self) -> int:
        return self.fragment.plan.rank

    @property
    def gradient_lines(self) -> Tensor:
        """Q^T G, without the error."""
        return self.lines[self.rank : 2 * self.rank] if self.own_gradient_lines else self.lines[: self.rank]

    @property
    def on_rows(self) -> bool:
        assert self.fragment.shards is not None
        return self.fragment.shards.basis_on_rows


@dataclass(eq=False)
class _Slot:
    """Values (n, k) of this rank, and where they go among the slot's `count` rows; no `places`: row i to row i."""

    values: Tensor
    count: int
    places: tuple[Tensor, Tensor] | None = None

    @property
    def size(self) -> int:
        return self.count * self.values.shape[1]


def sum_borders(works: list[Work], comm: InsideComm) -> None:
    """Complete the coordinates of border rows and the row sums, in one all-reduce."""
    slots: list[_Slot] = []
    for work in works:
        fragment = work.fragment
        count = len(fragment.border_rows)
        if not work.on_rows:
            slots.append(_Slot(work.lines.mT, count, fragment.border_places))  # l counts rows here: (columns, n)
            if work.row_sums is not None:
                slots.append(_Slot(work.row_sums.unsqueeze(1), fragment.plan.basis_side))  # (s, 1), of all shards
        elif work.row_sums is not None:
            slots.append(_Slot(work.row_sums.unsqueeze(1), count, fragment.border_places))
    buffer = works[0].lines.new_zeros(sum(slot.size for slot in slots))
    parts = [  # views of the buffer, (count, k) each
        part.view(slot.count, slot.values.shape[1])
        for part, slot in zip(buffer.split([slot.size for slot in slots]), slots, strict=True)
    ]
    for part, slot in zip(parts, slots, strict=True):
        if slot.places is not None:
            part[slot.places[0]] = slot.values[slot.places[1]]
        elif len(slot.values):
            part.copy_(slot.values)
    comm.sum_(buffer, "border")
    for part, slot in zip(parts, slots, strict=True):
        if slot.places is not None:
            slot.values[slot.places[1]] = part[slot.places[0]]
        elif len(slot.values):
            slot.values.copy_(part)


def scatter_columns(works: list[Work], comm: InsideComm) -> None:
    """Sum partial coordinates over the shards; each keeps its slice of the columns.

    One message for all matrices: row i of it is what shard i is to keep of each, flat, one after the other.
    """
    chosen = [work for work in works if work.on_rows]
    if not chosen:
        return
    parts = []
    for work in chosen:
        assert work.fragment.shards is not None
        width = work.fragment.shards.slice_width
        # (n, l) -> (n, shards * width), the last ones padded
        padded = torch.nn.functional.pad(work.lines, (0, width * comm.size - work.lines.shape[1]))
        # -> (n, shards, width) -> (shards, n, width) -> (shards, n * width)
        parts.append(padded.view(len(work.lines), comm.size, width).transpose(0, 1).reshape(comm.size, -1))
    sizes = [part.shape[1] for part in parts]
    # (shards, sum of n * width) -> this shard's row, (sum of n * width,)
    mine = comm.scatter_sum(torch.cat(parts, dim=1), "columns").split(sizes)
    for work, part in zip(chosen, mine, strict=True):
        assert work.fragment.shards is not None
        first, last = work.fragment.shards.moment_columns(comm.index)
        work.lines = part.view(len(work.lines), -1)[:, : last - first]  # (n * width,) -> (n, width) without padding


def sum_rows_over_slices(works: list[Work], tensor: InsideComm) -> None:
    """Complete the row sums of matrices that tensor parallelism slices, in one all-reduce."""
    sums = [work.row_sums for work in works if work.row_sums is not None and work.fragment.plan.partitions > 1]
    if tensor.size > 1 and sums:
        flat = tensor.sum_(torch.cat(sums), "row_sums")
        torch._foreach_copy_(sums, list(flat.split([part.numel() for part in sums])))


def gather_columns(works: list[Work], updates: list[Update], errors: list[Tensor | None], comm: InsideComm) -> None:
    """Give every shard the columns that its tiles need of matrices with the basis on their rows.

    The way back of `scatter_columns`. One message for all matrices: each shard's n lines of its slice of the columns,
    flat, matrix after matrix; at its end the shares of the means, one number per matrix where they are asked for.
    """
    chosen = [i for i, work in enumerate(works) if work.on_rows]
    if not chosen:
        return
    rows = []
    for i in chosen:
        shards = works[i].fragment.shards
        assert shards is not None
        lines = torch.cat(_gathered_lines(updates[i], errors[i]))  # (n, columns of this slice)
        # -> (n, width): the last slices are padded
        rows.append(torch.nn.functional.pad(lines, (0, shards.slice_width - lines.shape[1])))
    shares = [mean for i in chosen if (mean := updates[i].mean) is not None]
    mine = torch.cat([*(row.flatten() for row in rows), *(share.view(1) for share in shares)])
    everything = comm.gather(mine, "columns")  # (shards, sum of n * width + means)
    for i, mean in zip(chosen if shares else (), everything[:, len(mine) - len(shares) :].sum(0), strict=True):
        updates[i].mean = mean
    columns_of = everything[:, : len(mine) - len(shares)].split([row.numel() for row in rows], dim=1)
    for i, part, row in zip(chosen, columns_of, rows, strict=True):
        columns = works[i].fragment.plan.other_side
        # (shards, n * width) -> (shards, n, width) -> (n, shards, width) -> (n, shards * width) -> (n, l)
        whole = part.reshape(comm.size, len(row), -1).transpose(0, 1).reshape(len(row), -1)[:, :columns]
        _set_gathered(
            updates[i], errors, i, list(whole.split([len(x) for x in _gathered_lines(updates[i], errors[i])]))
        )


def _gathered_lines(update: Update, projected: Tensor | None) -> list[Tensor]:
    """What an update needs along l: each (r or 1, columns)."""
    lines = [update.coordinates, update.den_mean, update.gradient, projected]
    found = [line for line in lines if line is not None]
    return found if update.col is None else [*found, update.col.unsqueeze(0)]


def _set_gathered(update: Update, errors: list[Tensor | None], i: int, whole: list[Tensor]) -> None:
    """The inverse of `_gathered_lines`."""
    update.coordinates = whole.pop(0)
    if update.den_mean is not None:
        update.den_mean = whole.pop(0)
    if update.gradient is not None:
        update.gradient = whole.pop(0)
    if errors[i] is not None:
        errors[i] = whole.pop(0)
    if update.col is not None:
        update.col = whole.pop(0).squeeze(0)
