"""Small problems with known weights and gradients, for comparing trajectories.

The leading directions of a pseudo-gradient are ill-conditioned where singular values are close, so the
gradients here have a spectrum with clear gaps, equal on all replicas up to a replica's own part.
"""

from __future__ import annotations

import functools
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from lordo_ds.core.grouping import ParameterFacts

Places = AbstractSet[tuple[int, int]]  # (attempted step, replica)
SHAPES = {"tall": (20, 6), "long": (60, 5), "wide": (5, 16), "square": (8, 8), "small": (2, 7), "bias": (9,)}


def facts() -> list[ParameterFacts]:
    return [ParameterFacts(name, shape) for name, shape in SHAPES.items()]


def initial_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """Multiples of 1/32 below 4 in size: exact in bf16 and fp16 too."""
    generator = torch.Generator().manual_seed(7)
    draw = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {name: (value.clamp(-3.9, 3.9) * 32).round().div(32).to(dtype) for name, value in draw.items()}


@functools.cache
def _common_sides(index: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The singular vectors that a matrix's gradients have on all replicas and at all steps."""
    generator = torch.Generator().manual_seed(1000 * index + 17)
    k = min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, k, generator=generator, dtype=torch.float64)).Q for side in shape)
    return left, right


def faulty_gradients(
    step: int, replicas: int, dtype: torch.dtype, skips: Places, nans: Places
) -> list[dict[str, Tensor] | None]:
    """Those of every replica: None where it skips the step, not finite where `nans` says."""
    found: list[dict[str, Tensor] | None] = []
    for m in range(replicas):
        scale = float("nan") if (step, m) in nans else 1.0
        found.append(None if (step, m) in skips else {n: scale * g for n, g in gradients(step, m, dtype).items()})
    return found


def gradients(step: int, replica: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradient of one replica at one step; every caller gets the same numbers."""
    out = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        own = torch.Generator().manual_seed(100_000 * (replica + 1) + 100 * step + index)
        noise = torch.randn(shape, generator=own, dtype=torch.float64)
        if len(shape) == 1:
            value = noise
        else:
            k = min(shape)
            left, right = _common_sides(index, shape)
            spectrum = 4.0 * 0.45 ** torch.arange(k, dtype=torch.float64)
            mix = 1.0 + 0.3 * torch.randn(k, generator=own, dtype=torch.float64)
            value = left @ torch.diag(spectrum * mix) @ right.T + 0.02 * noise
        out[name] = value.to(dtype)
    return out
