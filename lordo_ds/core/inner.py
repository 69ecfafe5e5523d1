"""The inner step: what one replica does with its own gradient, with no communication across replicas."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepSettings:
    """Numbers of one inner step. `step` is t, the count of executed steps including this one."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    omega: float
    qh_mode: str
    step: int

    @property
    def bias_corrections(self) -> tuple[float, float]:
        return 1.0 - self.betas[0] ** self.step, 1.0 - self.betas[1] ** self.step


@dataclass
class LowRankState:
    """Views of one matrix's optimizer state, oriented like the matrix.

    exp_avg, exp_avg_sq: (r, l). error: (s, l) or None. row: (s,), col: (l,), for `factored` only.
    """

    basis: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    error: Tensor | None = None
    row: Tensor | None = None
    col: Tensor | None = None
    # Filled by the step when `measure` is set: energies |Q^T G|^2 and |G|^2.
    measure: bool = False
    energies: tuple[Tensor, Tensor] | None = field(default=None, repr=False)


def project(basis: Tensor, matrix: Tensor) -> Tensor:
    """Coordinates Q^T A of a matrix (s, l) in the basis (s, r): (r, l)."""
    return basis.mT @ matrix


def lift(basis: Tensor, coordinates: Tensor) -> Tensor:
    """The matrix Q x, (s, l), that has the coordinates x (r, l) in the basis (s, r)."""
    return basis @ coordinates


def with_error(gradient: Tensor, error: Tensor | None) -> Tensor:
    """A = G + E, or G itself without error feedback."""
    return gradient if error is None else gradient + error.to(gradient.dtype)


def low_rank_step_(weight: Tensor, gradient: Tensor, state: LowRankState, settings: StepSettings) -> None:
    """One inner step of a projected matrix; `weight` and the tensors of `state` are updated in place.

        A = G + E;  g = Q^T A;  E = A - Q g
        u = b1 u + (1-b1) g;  v = b2 v + (1-b2) g^2;  den = sqrt(v/c2) + eps;  N = (u/c1)/den
        full_rank  W -= lr [ (1-omega) G / mean_r(den) + omega Q N ]
        low_rank   W -= lr Q [ ((1-omega) Q^T G + omega u/c1) / den ]
        none       W -= lr Q N
        factored   the low_rank term, and (1-omega) (G - Q Q^T G) over its own factored preconditioner

    with decoupled weight decay first (AdamW). Source: LoRDO, arXiv 2602.04396; quasi-hyperbolic momentum
    arXiv 1810.06801; error feedback as LDAdam, arXiv 2410.16103; factored second moment as Adafactor,
    arXiv 1804.04235.

    Args:
        weight: W, (s, l), may be a transposed view.
        gradient: G, (s, l), same dtype as weight; not modified.
    """
    b1, b2 = settings.betas
    c1, c2 = settings.bias_corrections
    Q, u, v = state.basis, state.exp_avg, state.exp_avg_sq
    A = with_error(gradient, state.error)
    g = project(Q, A)
    if state.error is not None:
        state.error.copy_(torch.addmm(A, Q, g, alpha=-1.0))
    del A
    u.lerp_(g, 1.0 - b1)
    v.mul_(b2).addcmul_(g, g, value=1.0 - b2)
    den = (v / c2).sqrt_().add_(settings.eps)
    needs_projection = settings.qh_mode in ("low_rank", "factored") or state.measure
    gradient_coordinates = g if state.error is None or not needs_projection else project(Q, gradient)
    if state.measure:
        state.energies = (gradient_coordinates.square().sum(), gradient.square().sum())

    if settings.weight_decay:
        weight.mul_(1.0 - settings.lr * settings.weight_decay)
    if settings.qh_mode == "none":
        weight.addmm_(Q, u / den, alpha=-settings.lr / c1)
        return
    if settings.qh_mode == "full_rank":
        weight.addcdiv_(gradient, den.mean(dim=-2, keepdim=True), value=-settings.lr * (1.0 - settings.omega))
        weight.addmm_(Q, u / den, alpha=-settings.lr * settings.omega / c1)
        return
    mixed = gradient_coordinates.mul(1.0 - settings.omega).add_(u, alpha=settings.omega / c1).div_(den)
    weight.addmm_(Q, mixed, alpha=-settings.lr)
    if settings.qh_mode == "factored":
        _factored_residual_step_(weight, gradient, gradient_coordinates, state, settings, b2, c2)


def _factored_residual_step_(
    weight: Tensor, gradient: Tensor, coordinates: Tensor, state: LowRankState, settings: StepSettings, b2: float, c2: float
) -> None:
    """W -= lr (1-omega) P / (sqrt(rh ch^T / mean(rh)) + eps), with P = G - Q Q^T G."""
    assert state.row is not None and state.col is not None
    square = gradient.square()
    state.row.lerp_(square.mean(dim=-1), 1.0 - b2)
    state.col.lerp_(square.mean(dim=-2), 1.0 - b2)
    del square
    row_hat, col_hat = state.row / c2, state.col / c2
    mean = row_hat.mean()
    # A gradient that was always zero has no direction: the residual is zero, not 0/0.
    row_share = torch.where(mean > 0, row_hat / mean, torch.zeros_like(row_hat))
    preconditioner = torch.outer(row_share, col_hat).sqrt_().add_(settings.eps)
    residual = torch.addmm(gradient, state.basis, coordinates, alpha=-1.0)
    residual = torch.where(mean > 0, residual.div_(preconditioner), torch.zeros_like(residual))
    weight.add_(residual, alpha=-settings.lr * (1.0 - settings.omega))


def adamw_step_(weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, settings: StepSettings) -> None:
    """AdamW on a parameter that is not projected; all but `gradient` are updated in place."""
    b1, b2 = settings.betas
    c1, c2 = settings.bias_corrections
    if settings.weight_decay:
        weight.mul_(1.0 - settings.lr * settings.weight_decay)
    exp_avg.lerp_(gradient, 1.0 - b1)
    exp_avg_sq.mul_(b2).addcmul_(gradient, gradient, value=1.0 - b2)
    den = (exp_avg_sq / c2).sqrt_().add_(settings.eps)
    weight.addcdiv_(exp_avg, den, value=-settings.lr / c1)


def rotate_moments_(
    exp_avg: Tensor, exp_avg_sq: Tensor, old_basis: Tensor, new_basis: Tensor, betas: tuple[float, float], step: int
) -> None:
    """Express the moments, in place, in a new basis: R = Q'^T Q.

        u <- R u ;   v <- c2 | R^2 (v^ - u^^2) + (R u^)^2 |        (^ bias-corrected, squares elementwise)

    Source: LDAdam, arXiv 2410.16103. Without an executed step the moments are zero and stay so.
    """
    if step == 0:
        return
    c1, c2 = 1.0 - betas[0] ** step, 1.0 - betas[1] ** step
    R = new_basis.mT @ old_basis
    u_hat, v_hat = exp_avg / c1, exp_avg_sq / c2
    rotated = R @ u_hat
    variance = R.square() @ (v_hat - u_hat.square())
    exp_avg.copy_(rotated * c1)
    exp_avg_sq.copy_((variance + rotated.square()).abs_() * c2)


def rescale_bias_correction(beta: float, step: int, common_step: int) -> float:
    """Factor that keeps a moment's bias-corrected value when its step count becomes `common_step`."""
    if step == common_step or step == 0:
        return 1.0
    return (1.0 - beta**common_step) / (1.0 - beta**step)

