"""Replicas that are finite and wrong: how far each went since the last sync, against the others.

A flipped exponent bit makes a weight of 1e5 out of one of 1e-2, or has a moment divide by next to nothing. One such
replica in an average is in all of them. Before it is made, every replica tells a few sizes of what it holds; one that
stands out by more than `max_outlier` is treated as one that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lordo_ds.core.outer import pseudo_gradient
from lordo_ds.core.state import WIRE_ERRORS
from lordo_ds.replica.fragment import Fragment

# Sizes that a replica tells, in this order: |D_m| over the whole replica, and the largest absolute value of each kind.
SIZES: Mapping[str, str] = {
    "pseudo_gradient": "|anchor - weights|",
    "pseudo_gradient_peak": "the largest element of anchor - weights",
    "weight": "the largest weight",
    "exp_avg": "the largest element of exp_avg",
    "exp_avg_sq": "the largest root in exp_avg_sq",
    "row_mean_sq": "the largest root in row_mean_sq",
    "col_mean_sq": "the largest root in col_mean_sq",
    "error": "the largest element of the error feedback",
}
_NAMES = tuple(SIZES)
_SQUARES = ("exp_avg_sq", "row_mean_sq", "col_mean_sq")
_CHUNK_NUMEL = 1 << 20  # bounds the copy of D that is never kept


@torch.no_grad()
def sizes_of(items: Sequence[Fragment], with_pseudo_gradient: bool) -> list[float]:
    """This rank's part of the sizes, the first one squared; not finite where something that it holds is not."""
    found = dict.fromkeys(_NAMES, 0.0)
    if with_pseudo_gradient:
        found["pseudo_gradient"], found["pseudo_gradient_peak"] = _pseudo_gradient_sizes(items)
    by_dtype: dict[torch.dtype, list[tuple[str, Tensor]]] = {}
    for item in items:
        for name, tensor in kept_tensors(item):
            if tensor.numel():
                by_dtype.setdefault(tensor.dtype, []).append((name, tensor.detach()))
    for chosen in by_dtype.values():
        peaks = torch._foreach_norm([tensor for _, tensor in chosen], float("inf"))
        for (name, _), peak in zip(chosen, torch.stack([p.double() for p in peaks]).tolist(), strict=True):
            found[name] = _larger(found[name], math.sqrt(peak) if name in _SQUARES else peak)
    return list(found.values())


def kept_tensors(item: Fragment) -> Iterator[tuple[str, Tensor]]:
    """Everything of a fragment that can break, by the name of its size."""
    yield "weight", item.weight
    for kept, tensor, _ in item.moments():
        yield kept.name, tensor
    for name in ("error", *WIRE_ERRORS):
        if name in item.state:
            yield "error", item.state[name]


def _pseudo_gradient_sizes(items: Sequence[Fragment]) -> tuple[float, float]:
    """|D_m|^2 and the largest element of this rank's part; one host synchronisation."""
    squares, peaks = [], []
    for item in items:
        if "anchor" in item.state and item.numel:
            for anchor, weight in zip(
                item.state["anchor"].split(_CHUNK_NUMEL), item.weight.split(_CHUNK_NUMEL), strict=True
            ):
                part = pseudo_gradient(anchor, weight)
                squares.append(torch.linalg.vector_norm(part, dtype=torch.float64).square())
                peaks.append(torch.linalg.vector_norm(part, float("inf")).double())
    if not squares:
        return 0.0, 0.0
    square, peak = torch.stack([torch.stack(squares).sum(), torch.stack(peaks).amax()]).tolist()
    return square, peak


def _larger(one: float, other: float) -> float:
    """NaN if either is."""
    return one if math.isnan(one) or one > other else other


def of_whole_replica(parts: Tensor) -> list[float]:
    """The sizes of a replica from those of its ranks, (ranks, sizes), float64."""
    sizes = parts.amax(0)  # NaN where one is
    sizes[0] = parts[:, 0].sum().sqrt()
    return [float(size) for size in sizes]


def far_from_others(
    sizes: Sequence[Sequence[float]],
    finite: Sequence[bool],
    executed_steps: Sequence[int],
    before: Sequence[Sequence[float]],
    limit: float,
) -> dict[int, str]:
    """The replicas with a size of more than `limit` times that of the others, and by how much, in words.

    A size is held against the median of the replicas that executed at least as many steps: one that skipped some has
    moved less by right, with a learning rate that warms up by any factor. Where there is one such replica only (of two,
    always), the larger of its size and of what the replica had at the last sync it took part in is the measure, so
    that a growth that both have, or that it always had, is none. Without any there is nothing to hold it against.

    Args:
        sizes: of every replica, in the order of `SIZES`.
        before: of every replica at the last sync that it took part in; 0 where there was none.
    """
    found: dict[int, str] = {}
    for m, own in enumerate(sizes):
        peers = [j for j, ok in enumerate(finite) if ok and j != m and executed_steps[j] >= executed_steps[m]]
        for place, words in enumerate(SIZES.values()) if finite[m] else ():
            measures = sorted(sizes[j][place] for j in peers if sizes[j][place] > 0)
            if len(measures) == 1:
                measures = sorted([*measures, before[m][place]])
            if measures and m not in found and own[place] > limit * measures[len(measures) // 2]:
                measure = measures[len(measures) // 2]
                found[m] = f"{words} is {own[place]:.3g}, {own[place] / measure:.3g} times that of the others"
    return found
