"""The outer step: what all replicas do with the averaged pseudo-gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lordo_ds.config import OuterOptimizer


def pseudo_gradient(anchor: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """D_m = anchor - W_m, one replica's part of the pseudo-gradient; descent directions are positive.

    The anchor may live elsewhere or in a lower precision; the difference has weight's dtype and device.
    """
    anchor = anchor.to(device=weight.device, dtype=weight.dtype, non_blocking=True)
    return torch.sub(anchor, weight, out=out)


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
