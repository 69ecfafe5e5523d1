"""Numbers that say whether training is stuck in a subspace: spectra of weights and of what training added to them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_GAP_LIMIT = 1e6


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007); 0 for a zero matrix."""
    total = values.sum()
    if not bool(total > 0):
        return 0.0
    shares = values / total
    return float(torch.exp(-(shares * shares.clamp_min(1e-30).log()).sum()))


def stable_rank(values: Tensor) -> float:
    """Squared Frobenius over squared spectral norm; 0 for a zero matrix."""
    return float(values.square().sum() / values[0].square()) if bool(values[0] > 0) else 0.0


def gap(values: Tensor, position: int) -> float:
    """sigma_k / sigma_(k+1), at most a million; 1 where there is no k + 1."""
    if position >= len(values):
        return 1.0
    below = max(float(values[position]), 1e-30)
    return min(float(values[position - 1]) / below, _GAP_LIMIT)


def spectra(matrices: Iterable[tuple[str, Tensor, Tensor, int]]) -> dict[str, float]:
    """Means over matrices given as (name, weight now, weight at the start, rank of the basis).

    Returns:
        change_effective_rank: of W - W_0, all projected matrices.
        outside: share of the energy of W - W_0 outside its r leading directions; 0 is a total change of rank r.
        attention_*: of the attention matrices only; `gap_at_rank` is sigma_r / sigma_(r+1) of the change, and
            `spectral_gap` sigma_1 / sigma_2 of the weights.
    """
    sums: dict[str, list[float]] = {}
    for name, weight, start, rank in matrices:
        change = torch.linalg.svdvals((weight - start).double().cpu())
        energy = change.square()
        found = {"change_effective_rank": effective_rank(change)}
        found["outside"] = float(energy[rank:].sum() / energy.sum()) if bool(energy.sum() > 0) else 0.0
        if ".attention." in name:
            now = torch.linalg.svdvals(weight.double().cpu())
            found |= {
                "attention_stable_rank": stable_rank(now),
                "attention_spectral_gap": gap(now, 1),
                "attention_change_stable_rank": stable_rank(change),
                "attention_change_gap_at_rank": gap(change, rank),
            }
        for key, value in found.items():
            sums.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in sums.items()}
