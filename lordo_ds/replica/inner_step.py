"""One inner step of projected fragments: coordinates, one exchange inside the replica, moments, update.

With one shard nothing is exchanged. With several, border rows and row sums travel in one small all-reduce;
matrices with the basis on their rows sum partial coordinates by a reduce-scatter over columns, and gather what their
update needs. Every rank of the shard group runs the same static schedule, with or without elements of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideComm, InsideReplica
from lordo_ds.core.inner import StepSettings, Update, advance_moments_, apply_update_, with_error
from lordo_ds.replica.fragment import Fragment


@dataclass(eq=False)
class _Work:
    """One fragment during a step; coordinates are (lines, columns): Q^T A, then Q^T G and column sums where asked."""

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


def step_fragments_(
    fragments: Sequence[Fragment],
    gradients: Sequence[Tensor],
    settings: Sequence[StepSettings],
    inside: InsideReplica,
    measure: bool,
) -> None:
    """Step projected fragments that have a basis, in place. Collective over the shard group and the slices.

    Args:
        fragments: in the same order on every rank of the shard group.
        gradients: (numel,) each, not modified.
        settings: of each fragment; `step` counts this one.
        measure: leave the gradient's energies, inside the basis and in all, in what waits of each fragment.
    """
    works, comm = [_project(*each, measure) for each in zip(fragments, gradients, settings, strict=True)], inside.shard
    if comm.size > 1:
        _sum_borders(works, comm)
        _scatter_columns(works, comm)
    _sum_rows_over_slices(works, inside.tensor)
    updates = _advance(works)
    errors = [None if work.fragment.error is None else work.lines[: work.rank] for work in works]
    if comm.size > 1:
        _gather_columns(works, updates, errors, comm)
    for work, update, projected in zip(works, updates, errors, strict=True):
        if measure:
            _measure(work)
        _apply(work, update, projected)


def _project(fragment: Fragment, gradient: Tensor, settings: StepSettings, measure: bool) -> _Work:
    """This rank's partial coordinates of its tiles."""
    rank, factored = fragment.plan.rank, settings.qh_mode == "factored"
    needs_gradient = fragment.error is not None and (measure or settings.qh_mode in ("low_rank", "factored"))
    lines = fragment.weight.new_zeros(rank * (1 + needs_gradient) + factored, fragment.coordinate_columns)
    row_sums = fragment.weight.new_zeros(fragment.basis_rows) if factored else None
    for tile in fragment.tiles:
        G, Q = tile.view(gradient), fragment.basis[tile.s]
        A = with_error(G, None if fragment.error is None else tile.view(fragment.error))
        target = lines[:, tile.l]
        target[:rank].addmm_(Q.mT, A)
        if needs_gradient:
            target[rank : 2 * rank].addmm_(Q.mT, G)
        if row_sums is not None:
            square = G.square()
            target[-1] += square.sum(dim=0)
            row_sums[tile.s] += square.sum(dim=1)
    return _Work(fragment, gradient, settings, lines, row_sums, needs_gradient)


@dataclass(eq=False)
class _Slot:
    """Values (n, k) of this rank, and where they go among the slot's `count` rows; no `places`: row i to row i."""

    values: Tensor
    count: int
    places: tuple[Tensor, Tensor] | None = None

    @property
    def size(self) -> int:
        return self.count * self.values.shape[1]


def _sum_borders(works: list[_Work], comm: InsideComm) -> None:
    """Complete the coordinates of border rows and the row sums, in one all-reduce."""
    slots: list[_Slot] = []
    for work in works:
        fragment = work.fragment
        count = len(fragment.border_rows)
        if not work.on_rows:
            slots.append(_Slot(work.lines.mT, count, fragment.border_places))
            if work.row_sums is not None:
                slots.append(_Slot(work.row_sums.unsqueeze(1), fragment.plan.basis_side))
        elif work.row_sums is not None:
            slots.append(_Slot(work.row_sums.unsqueeze(1), count, fragment.border_places))
    buffer = works[0].lines.new_zeros(sum(slot.size for slot in slots))
    parts = [
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


def _scatter_columns(works: list[_Work], comm: InsideComm) -> None:
    """Sum partial coordinates over the shards; each keeps its slice of the columns."""
    chosen = [work for work in works if work.on_rows]
    if not chosen:
        return
    parts = []
    for work in chosen:
        assert work.fragment.shards is not None
        width = work.fragment.shards.slice_width
        padded = torch.nn.functional.pad(work.lines, (0, width * comm.size - work.lines.shape[1]))
        parts.append(padded.view(len(work.lines), comm.size, width).transpose(0, 1).reshape(comm.size, -1))
    sizes = [part.shape[1] for part in parts]
    mine = comm.scatter_sum(torch.cat(parts, dim=1), "columns").split(sizes)
    for work, part in zip(chosen, mine, strict=True):
        assert work.fragment.shards is not None
        first, last = work.fragment.shards.moment_columns(comm.index)
        work.lines = part.view(len(work.lines), -1)[:, : last - first]


def _sum_rows_over_slices(works: list[_Work], tensor: InsideComm) -> None:
    """Complete the row sums of matrices that tensor parallelism slices, in one all-reduce."""
    sums = [work.row_sums for work in works if work.row_sums is not None and work.fragment.plan.partitions > 1]
    if tensor.size > 1 and sums:
        flat = tensor.sum_(torch.cat(sums), "row_sums")
        torch._foreach_copy_(sums, list(flat.split([part.numel() for part in sums])))


def _advance(works: list[_Work]) -> list[Update]:
    """Moments of the columns this rank keeps, and the coordinates to lift there."""
    updates: dict[int, Update] = {}
    for chosen in _stepped_together(works):
        updates.update(zip(chosen, _advance_together([works[i] for i in chosen]), strict=True))
    return [updates[i] for i in range(len(works))]


def _stepped_together(works: list[_Work]) -> list[list[int]]:
    """Which matrices take each elementwise operation at once.

    On a GPU, where starting an operation costs more than doing it, all those with equal settings; on a CPU each
    alone, because what one operation wrote is then still in the cache for the next.
    """
    together: dict[object, list[int]] = {}
    for i, work in enumerate(works):
        together.setdefault(work.settings if work.lines.is_cuda else i, []).append(i)
    return list(together.values())


def _advance_together(works: list[_Work]) -> list[Update]:
    settings, states = works[0].settings, [work.fragment.state for work in works]
    updates = advance_moments_(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [work.lines[: work.rank] for work in works],
        [work.gradient_lines for work in works],
        settings,
    )
    if settings.qh_mode == "factored":
        sums = [work.row_sums for work in works if work.row_sums is not None] + [work.lines[-1] for work in works]
        plans = [work.fragment.plan for work in works]
        sides = [plan.whole_other_side for plan in plans] + [plan.basis_side for plan in plans]
        means = [state[name] for name in ("row_mean_sq", "col_mean_sq") for state in states]
        torch._foreach_lerp_(means, torch._foreach_div(sums, sides), 1.0 - settings.betas[1])
        corrected = torch._foreach_div(means, settings.bias_corrections[1])
        for work, update, row, col in zip(
            works, updates, corrected[: len(works)], corrected[len(works) :], strict=True
        ):
            update.row, update.col, update.mean = row, col, _mean_of_rows(work, row)
    return updates


def _mean_of_rows(work: _Work, row: Tensor) -> Tensor:
    """Mean of the row means: this shard's share of it where shards hold different rows."""
    assert work.fragment.shards is not None
    if work.on_rows and work.fragment.comm.size > 1:
        first = work.fragment.shards.rows(work.fragment.comm.index)[0]
        owned = work.fragment.shards.owned_rows(work.fragment.comm.index)
        row = row[max(0, owned[0] - first) : max(0, owned[1] - first)]
    return row.sum() / work.fragment.plan.basis_side


def _gather_columns(works: list[_Work], updates: list[Update], errors: list[Tensor | None], comm: InsideComm) -> None:
    """Give every shard the columns that its tiles need of matrices with the basis on their rows."""
    chosen = [i for i, work in enumerate(works) if work.on_rows]
    if not chosen:
        return
    rows = []
    for i in chosen:
        shards = works[i].fragment.shards
        assert shards is not None
        lines = torch.cat(_gathered_lines(updates[i], errors[i]))
        rows.append(torch.nn.functional.pad(lines, (0, shards.slice_width - lines.shape[1])))
    shares = [mean for i in chosen if (mean := updates[i].mean) is not None]
    mine = torch.cat([*(row.flatten() for row in rows), *(share.view(1) for share in shares)])
    everything = comm.gather(mine, "columns")
    for i, mean in zip(chosen if shares else (), everything[:, len(mine) - len(shares) :].sum(0), strict=True):
        updates[i].mean = mean
    columns_of = everything[:, : len(mine) - len(shares)].split([row.numel() for row in rows], dim=1)
    for i, part, row in zip(chosen, columns_of, rows, strict=True):
        columns = works[i].fragment.plan.other_side
        whole = part.reshape(comm.size, len(row), -1).transpose(0, 1).reshape(len(row), -1)[:, :columns]
        _set_gathered(
            updates[i], errors, i, list(whole.split([len(x) for x in _gathered_lines(updates[i], errors[i])]))
        )


def _gathered_lines(update: Update, projected: Tensor | None) -> list[Tensor]:
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


def _measure(work: _Work) -> None:
    """Energies of the gradient on this rank, border rows counted once."""
    fragment = work.fragment
    shards = fragment.shards
    assert shards is not None
    lines = work.gradient_lines
    if not shards.basis_on_rows:
        first = shards.rows(fragment.comm.index)[0]
        owned = shards.owned_rows(fragment.comm.index)
        lines = lines[:, max(0, owned[0] - first) : max(0, owned[1] - first)]
    fragment.waiting.energies = (lines.square().sum(), work.gradient.square().sum())


def _apply(work: _Work, update: Update, projected: Tensor | None) -> None:
    fragment = work.fragment
    weight = fragment.weight
    for tile in fragment.tiles:
        Q, G = fragment.basis[tile.s], tile.view(work.gradient)
        if projected is not None and fragment.error is not None:
            E = tile.view(fragment.error)
            E.copy_(with_error(G, E).addmm_(Q, projected[:, tile.l], alpha=-1.0))
        part = Update(
            update.coordinates[:, tile.l],
            None if update.den_mean is None else update.den_mean[:, tile.l],
            None if update.gradient is None else update.gradient[:, tile.l],
            None if update.row is None else update.row[tile.s],
            None if update.col is None else update.col[tile.l],
            update.mean,
        )
        apply_update_(tile.view(weight), G, Q, part, work.settings)
