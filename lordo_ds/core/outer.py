"""The outer step: what all replicas do with the averaged pseudo-gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lordo_ds.config import OuterOptimizer


def pseudo_gradient(anchor: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """D_m = anchor - W_m, one replica's part of the pseudo-gradient; descent directions are positive.

    The anchor may live elsewhere or in a lower precision; the difference has weight's dtype and device.
    """
    anchor = anchor.to(device=weight.device, dtype=weight.dtype, non_blocking=True)
    return torch.sub(anchor, weight, out=out)


# Odd quintic a x + b x^3 + c x^5 that takes singular values in (0, 1] to about 1 in few iterations: Muon,
# https://kellerjordan.github.io/posts/muon.
_QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(matrix: Tensor, summed: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
    """The matrix with all its singular values brought to about the same size, and its Frobenius norm kept.

    Newton-Schulz iterations, as Muon's: X <- (a I + b X X^T + c (X X^T)^2) X from X / |X|_F. Singular values below
    about 1/500 of the norm are not brought up all the way.

    Args:
        matrix: (s, l), or some of its columns; cheapest with s <= l.
        summed: the sum over those that hold the other columns; of a norm, and of (s, s) in every iteration.
    """
    norm = summed(matrix.square().sum().reshape(1)).sqrt()
    x = matrix / torch.where(norm > 0, norm, 1.0)  # a zero matrix stays zero
    a, b, c = _QUINTIC
    for _ in range(ITERATIONS):
        gram = summed(x @ x.mT)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    length = summed(x.square().sum().reshape(1)).sqrt()
    return x * (norm / torch.where(length > 0, length, 1.0))


def outer_update(mean: Tensor, momentum: Tensor | None, outer: OuterOptimizer) -> Tensor:
    """outer(D): D for plain averaging, else (Nesterov) momentum as in DiLoCo, arXiv 2311.08105.

        m = mu m + D ;   outer = a (D + mu m)   or, without nesterov,   a m

    Args:
        mean: D, averaged over replicas, any shape; not modified.
        momentum: m, same shape, updated in place (it may live on another device); None means plain averaging.
    """
    if momentum is None:
        return mean
    moved = momentum.to(device=mean.device, dtype=mean.dtype)  # the buffer itself where it already lives there
    moved.mul_(outer.momentum).add_(mean)
    if moved is not momentum:
        momentum.copy_(moved)
    direction = mean.add(moved, alpha=outer.momentum) if outer.nesterov else moved
    return direction * outer.lr
