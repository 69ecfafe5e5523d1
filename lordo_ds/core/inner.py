"""The inner step: what one replica does with its own gradient, with no communication across replicas.

It is cut where a sharded matrix must sum over its shards: coordinates of the gradient first, then the moments of
the coordinates a shard keeps, then the update of the elements it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepSettings:
    """Numbers of one inner step. `step` is t, the count of executed steps including this one.

    `residual_weight` is w, of the part of the gradient outside the basis, in mode `factored`.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    omega: float
    qh_mode: str
    step: int
    residual_weight: float

    @property
    def bias_corrections(self) -> tuple[float, float]:
        """(c1, c2) = (1 - b1^t, 1 - b2^t)."""
        return 1.0 - self.betas[0] ** self.step, 1.0 - self.betas[1] ** self.step


@dataclass
class Update:
    """What the update of a tile needs, all of the same columns.

    coordinates: (r, l), lifted with weight lr: omega N, or the mixed coordinates, by mode.
    den_mean: (1, l), mean of den over the r coordinates, for `full_rank`.
    gradient: (r, l), Q^T G, for `factored`.
    row, col: (s,) and (l,), bias-corrected row and column means of G^2, and their common mean, for `factored`.
    """

    coordinates: Tensor
    den_mean: Tensor | None = None
    gradient: Tensor | None = None
    row: Tensor | None = None
    col: Tensor | None = None
    mean: Tensor | None = None


def project(basis: Tensor, matrix: Tensor) -> Tensor:
    """Coordinates Q^T A of a matrix (s, l) in the basis (s, r): (r, l)."""
    return basis.mT @ matrix


def lift(basis: Tensor, coordinates: Tensor) -> Tensor:
    """The matrix Q x, (s, l), that has the coordinates x (r, l) in the basis (s, r)."""
    return basis @ coordinates


def with_error(gradient: Tensor, error: Tensor | None) -> Tensor:
    """A = G + E, or G itself without error feedback."""
    return gradient if error is None else gradient + error.to(gradient.dtype)


def advance_moments_(
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    projected: list[Tensor],
    gradients: list[Tensor],
    settings: StepSettings,
) -> list[Update]:
    """Adam moments of projected coordinates, updated in place, and the coordinates to lift.

        u = b1 u + (1-b1) g;  v = b2 v + (1-b2) g^2;  den = sqrt(v/c2) + eps;  N = (u/c1)/den
        none: N      full_rank: omega N, and mean_r(den)      low_rank, factored: ((1-omega) Q^T G + omega u/c1)/den

    Source: LoRDO, arXiv 2602.04396; quasi-hyperbolic momentum arXiv 1810.06801.

    Args:
        exp_avgs, exp_avg_sqs: one (r, l) of each matrix, at least one; shapes may differ between matrices.
        projected: g = Q^T (G + E), (r, l).
        gradients: Q^T G, (r, l); the same tensors without error feedback.
    """
    b1, b2 = settings.betas
    c1, c2 = settings.bias_corrections
    torch._foreach_lerp_(exp_avgs, projected, 1.0 - b1)
    torch._foreach_mul_(exp_avg_sqs, b2)
    torch._foreach_addcmul_(exp_avg_sqs, projected, projected, 1.0 - b2)
    dens = torch._foreach_div(exp_avg_sqs, c2)
    torch._foreach_sqrt_(dens)
    torch._foreach_add_(dens, settings.eps)
    if settings.qh_mode in ("low_rank", "factored"):
        mixed = torch._foreach_mul(gradients, 1.0 - settings.omega)
        torch._foreach_add_(mixed, exp_avgs, alpha=settings.omega / c1)
        torch._foreach_div_(mixed, dens)
        kept = gradients if settings.qh_mode == "factored" else [None] * len(mixed)
        return [Update(x, gradient=g) for x, g in zip(mixed, kept, strict=True)]
    normalised = torch._foreach_div(exp_avgs, dens)
    torch._foreach_mul_(normalised, (settings.omega if settings.qh_mode == "full_rank" else 1.0) / c1)
    if settings.qh_mode == "none":
        return [Update(x) for x in normalised]
    return [Update(x, den_mean=den.mean(dim=-2, keepdim=True)) for x, den in zip(normalised, dens, strict=True)]


def decay_(weight: Tensor, settings: StepSettings) -> None:
    """Decoupled weight decay (AdamW), in place: all that an executed step does to a matrix without a basis."""
    if settings.weight_decay:
        weight.mul_(1.0 - settings.lr * settings.weight_decay)


def apply_update_(weight: Tensor, gradient: Tensor, basis: Tensor, update: Update, settings: StepSettings) -> None:
    """Step the elements of one tile in place, with decoupled weight decay first (AdamW).

        full_rank  W -= lr [ (1-omega) G / mean_r(den) + omega Q N ]
        none, low_rank  W -= lr Q x
        factored   W -= lr [ Q x + w (G - Q Q^T G) / (sqrt(rh ch^T / mean(rh)) + eps) ]

    Source of the factored preconditioner: Adafactor, arXiv 1804.04235.

    Args:
        weight, gradient: (s, l) oriented tiles; may be transposed views.
        basis: the tile's rows of Q, (s, r).
    """
    decay_(weight, settings)
    weight.addmm_(basis, update.coordinates, alpha=-settings.lr)
    if update.den_mean is not None:
        weight.addcdiv_(gradient, update.den_mean, value=-settings.lr * (1.0 - settings.omega))
    if update.gradient is not None:
        assert update.row is not None and update.col is not None and update.mean is not None
        # A gradient that was always zero has no direction: its residual is 0/1, not 0/0.
        share = torch.where(update.mean > 0, update.row / update.mean, 1.0).sqrt_()
        col = torch.where(update.mean > 0, update.col, 1.0).sqrt_()
        # Both are laid out in memory like the tile, which may be transposed: mixed layouts take four times as long.
        preconditioner = torch.mul(share.unsqueeze(1), col, out=torch.empty_like(weight)).add_(settings.eps)
        residual = torch.addmm(gradient, basis, update.gradient, alpha=-1.0, out=torch.empty_like(weight))
        weight.addcdiv_(residual, preconditioner, value=-settings.lr * settings.residual_weight)


def adamw_step_(weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, settings: StepSettings) -> None:
    """AdamW on a parameter that is not projected; all but `gradient` are updated in place."""
    b1, b2 = settings.betas
    if weight.device.type in ("cpu", "cuda"):
        # What torch.optim.AdamW(fused=True) calls: one pass over memory, where the lines below take a dozen.
        step = torch.full((), float(settings.step), dtype=torch.float32, device=weight.device)  # as the kernel reads it
        torch._fused_adamw_(
            [weight],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step],
            lr=settings.lr,
            beta1=b1,
            beta2=b2,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            amsgrad=False,
            maximize=False,
        )
        return
    c1, c2 = settings.bias_corrections
    decay_(weight, settings)
    exp_avg.lerp_(gradient, 1.0 - b1)
    exp_avg_sq.mul_(b2).addcmul_(gradient, gradient, value=1.0 - b2)
    den = (exp_avg_sq / c2).sqrt_().add_(settings.eps)
    weight.addcdiv_(exp_avg, den, value=-settings.lr / c1)


def rotate_moments_(
    exp_avg: Tensor, exp_avg_sq: Tensor, rotation: Tensor, betas: tuple[float, float], step: int
) -> None:
    """Express the moments, in place, in a new basis: R = Q'^T Q, (r, r).

        u <- R u ;   v <- c2 | R^2 (v^ - u^^2) + (R u^)^2 |        (^ bias-corrected, squares elementwise)

    Source: LDAdam, arXiv 2410.16103. Without an executed step the moments are zero and stay so.
    """
    if step == 0:
        return
    c1, c2 = 1.0 - betas[0] ** step, 1.0 - betas[1] ** step
    u_hat, v_hat = exp_avg / c1, exp_avg_sq / c2
    rotated = rotation @ u_hat
    variance = rotation.square() @ (v_hat - u_hat.square())
    exp_avg.copy_(rotated * c1)
    exp_avg_sq.copy_((variance + rotated.square()).abs_() * c2)


def rescale_bias_correction(beta: float, step: int, common_step: int) -> float:
    """Factor that keeps a moment's bias-corrected value when its step count becomes `common_step`."""
    if step == common_step or step == 0:
        return 1.0
    return (1.0 - beta**common_step) / (1.0 - beta**step)
