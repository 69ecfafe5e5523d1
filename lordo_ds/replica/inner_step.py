"""One inner step of projected fragments: coordinates, one exchange inside the replica, moments, update.

With one shard nothing is exchanged. With several, border rows and row sums travel in one small all-reduce;
matrices with the basis on their rows sum partial coordinates by a reduce-scatter over columns, and gather what their
update needs. Every rank of the shard group runs the same static schedule, with or without elements of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.core.inner import StepSettings, Update, advance_moments_, apply_update_, with_error
from lordo_ds.replica.exchange import Work, gather_columns, scatter_columns, sum_borders, sum_rows_over_slices
from lordo_ds.replica.fragment import Fragment


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
        sum_borders(works, comm)
        scatter_columns(works, comm)
    sum_rows_over_slices(works, inside.tensor)
    updates = _advance(works)
    errors = [None if work.fragment.error is None else work.lines[: work.rank] for work in works]
    if comm.size > 1:
        gather_columns(works, updates, errors, comm)
    for work, update, projected in zip(works, updates, errors, strict=True):
        if measure:
            _measure(work)
        _apply(work, update, projected)


def _project(fragment: Fragment, gradient: Tensor, settings: StepSettings, measure: bool) -> Work:
    """This rank's partial coordinates of its tiles."""
    rank, factored = fragment.plan.rank, settings.qh_mode == "factored"
    needs_gradient = fragment.error is not None and (measure or settings.qh_mode in ("low_rank", "factored"))
    lines = fragment.weight.new_zeros(rank * (1 + needs_gradient) + factored, fragment.coordinate_columns)
    row_sums = fragment.weight.new_zeros(fragment.basis_rows) if factored else None
    for tile in fragment.tiles:
        G, Q = tile.view(gradient), fragment.basis[tile.s]  # (s, l) and (s, r) of the tile
        A = with_error(G, None if fragment.error is None else tile.view(fragment.error))
        target = lines[:, tile.l]  # (n, l), a view
        target[:rank].addmm_(Q.mT, A)
        if needs_gradient:
            target[rank : 2 * rank].addmm_(Q.mT, G)
        if row_sums is not None:
            square = G.square()
            target[-1] += square.sum(dim=0)
            row_sums[tile.s] += square.sum(dim=1)
    return Work(fragment, gradient, settings, lines, row_sums, needs_gradient)


def _advance(works: list[Work]) -> list[Update]:
    """Moments of the columns this rank keeps, and the coordinates to lift there."""
    updates: dict[int, Update] = {}
    for chosen in _stepped_together(works):
        updates.update(zip(chosen, _advance_together([works[i] for i in chosen]), strict=True))
    return [updates[i] for i in range(len(works))]


def _stepped_together(works: list[Work]) -> list[list[int]]:
    """Which matrices take each elementwise operation at once.

    On a GPU, where starting an operation costs more than doing it, all those with equal settings; on a CPU each
    alone, because what one operation wrote is then still in the cache for the next.
    """
    together: dict[object, list[int]] = {}
    for i, work in enumerate(works):
        together.setdefault(work.settings if work.lines.is_cuda else i, []).append(i)
    return list(together.values())


def _advance_together(works: list[Work]) -> list[Update]:
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


def _mean_of_rows(work: Work, row: Tensor) -> Tensor:
    """Mean of the row means: this shard's share of it where shards hold different rows."""
    assert work.fragment.shards is not None
    if work.on_rows and work.fragment.comm.size > 1:
        first = work.fragment.shards.rows(work.fragment.comm.index)[0]
        owned = work.fragment.shards.owned_rows(work.fragment.comm.index)
        row = row[max(0, owned[0] - first) : max(0, owned[1] - first)]
    return row.sum() / work.fragment.plan.basis_side


def _measure(work: Work) -> None:
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


def _apply(work: Work, update: Update, projected: Tensor | None) -> None:
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
