"""The inner step in place: on views, in mixed precision, on zeros; and moments in another basis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import whole
from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.core.inner import (
    StepSettings,
    Update,
    adamw_step_,
    apply_update_,
    lift,
    project,
    rescale_bias_correction,
    rotate_moments_,
    with_error,
)
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.inner_step import step_fragments_

MODES = ("full_rank", "factored", "low_rank", "none")
SETTINGS = StepSettings(
    lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, omega=0.4, qh_mode="none", step=1, residual_weight=0.6
)
S, L, R = 6, 9, 2


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(s: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(random(s, r, seed=seed)).Q.to(dtype)


class Matrix:
    """One projected (s, l) matrix of one replica; `transposed`: stored (l, s), its basis on the columns."""

    def __init__(
        self, mode: str, error: Any = False, dtype: torch.dtype = torch.float64, transposed: bool = False
    ) -> None:
        shape = (L, S) if transposed else (S, L)
        self.mode, self.transposed = mode, transposed
        self.weight = self.store(random(S, L, seed=5, dtype=dtype))
        side = "columns" if transposed else "rows"
        plan = ParameterPlan("w", shape, True, "", side=side, rank=R)
        self.fragment = Fragment(plan, self.weight, 0, whole(shape), InsideReplica(), {}, SETTINGS.betas)
        self.fragment.allocate(LordoConfig.parse({"qh_mode": mode, "error_feedback": error}))
        self.state = self.fragment.state
        self.use_basis(orthonormal(S, R, 9, dtype))

    def store(self, matrix: Tensor) -> Tensor:
        return matrix.mT.contiguous() if self.transposed else matrix.clone()

    def oriented(self, stored: Tensor) -> Tensor:
        """Stored or flat elements as (s, l)."""
        matrix = stored.view(self.fragment.plan.shape)
        return matrix.mT if self.transposed else matrix

    def use_basis(self, basis: Tensor) -> None:
        self.fragment.store_basis(basis)

    def step(self, gradient: Tensor, measure: bool = False, **changes: Any) -> None:
        """One step with an (s, l) gradient, which must not change."""
        stored = self.store(gradient)
        before = stored.clone()
        settings_now = replace(SETTINGS, qh_mode=self.mode, **changes)
        if "residual_weight" not in changes:
            settings_now = replace(settings_now, residual_weight=1.0 - settings_now.omega)
        step_fragments_([self.fragment], [stored.view(-1)], [settings_now], self.fragment.inside, measure)
        assert torch.equal(stored, before)


@pytest.mark.parametrize("feedback", [False, "fp32"])
@pytest.mark.parametrize("mode", MODES)
def test_a_transposed_view_is_updated_in_place_as_the_matrix_itself(mode: str, feedback: Any) -> None:
    plain, turned = Matrix(mode, feedback), Matrix(mode, feedback, transposed=True)
    held = {name: value for name, value in turned.state.items() if isinstance(value, Tensor)}
    weight_pointer = turned.weight.data_ptr()
    for t in (1, 2, 3):
        for matrix in (plain, turned):
            matrix.step(random(S, L, seed=t), step=t)
    assert turned.weight.data_ptr() == weight_pointer and turned.weight.is_contiguous()
    torch.testing.assert_close(turned.weight.mT, plain.weight, rtol=0, atol=1e-13)
    for name, tensor in held.items():
        assert turned.state[name] is tensor, f"{name} was replaced instead of updated"
        mine, other = tensor, plain.state[name]
        if name == "error":
            mine, other = turned.oriented(tensor), plain.oriented(other)
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-13)
    assert "error" not in turned.state or bool(turned.state["error"].any())


@pytest.mark.parametrize(("feedback", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_an_error_of_its_own_precision_is_read_into_the_gradient_and_stored_rounded(
    feedback: str, dtype: torch.dtype
) -> None:
    matrix = Matrix("none", feedback, torch.float32)
    error, basis = matrix.state["error"], matrix.fragment.basis
    error.copy_(random(S * L, seed=6))
    A = random(S, L, seed=1, dtype=torch.float32) + error.view(S, L).float()
    matrix.step(random(S, L, seed=1, dtype=torch.float32))
    assert error.dtype == dtype
    expected = A - basis @ (basis.mT @ A)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(error.view(S, L).float(), expected, rtol=unit, atol=1e-5)
    torch.testing.assert_close(matrix.state["exp_avg"], 0.1 * (basis.mT @ A))


def test_nothing_is_lost_by_error_feedback() -> None:
    """What was lifted plus what is kept is the sum of all gradients, whatever the basis does in between."""
    matrix = Matrix("none", "fp32")
    used = total = torch.zeros(S, L, dtype=torch.float64)
    for t in range(1, 5):
        basis, gradient = orthonormal(S, R, seed=t), random(S, L, seed=20 + t)
        matrix.use_basis(basis)
        used = used + lift(basis, project(basis, with_error(gradient, matrix.oriented(matrix.state["error"]))))
        total = total + gradient
        matrix.step(gradient, step=t)
    torch.testing.assert_close(used + matrix.oriented(matrix.state["error"]), total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_of_zeros_moves_nothing_and_makes_no_nan(mode: str, dtype: torch.dtype) -> None:
    matrix = Matrix(mode, "fp32", dtype)
    before = matrix.weight.clone()
    for t in (1, 2):
        matrix.step(torch.zeros(S, L, dtype=dtype), step=t, weight_decay=0.0)
    assert torch.equal(matrix.weight, before)
    assert not any(bool(matrix.state[name].any()) for name in ("exp_avg", "exp_avg_sq", "error"))


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
@pytest.mark.parametrize("mode", MODES)
def test_tiny_and_huge_gradients_keep_the_weights_finite(mode: str, scale: float) -> None:
    matrix = Matrix(mode, dtype=torch.float32)
    for t in (1, 2):
        gradient = scale * random(S, L, seed=t, dtype=torch.float32)
        gradient[:, 2], gradient[3] = 0, 0  # a dead column and a dead row
        matrix.step(gradient, step=t)
    assert bool(torch.isfinite(matrix.weight).all())


def test_the_factored_residual_is_adafactors_and_a_rank_one_square_is_normalised_exactly() -> None:
    """Where the squares of G are an outer product, P is divided by |G|: signs remain at the first step."""
    rows, columns = torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.tensor([1.0, -1, 2, -2, 3, -3, 4, -4, 5])
    gradient = torch.outer(rows, columns).double()
    matrix = Matrix("factored")
    matrix.weight.zero_()
    matrix.use_basis(torch.eye(S, R, dtype=torch.float64))
    matrix.step(gradient, weight_decay=0.0, eps=0.0, omega=0.0)
    torch.testing.assert_close(matrix.weight, -0.1 * gradient.sign())


@pytest.mark.parametrize("mode", ["full_rank", "factored", "low_rank"])
def test_omega_one_leaves_the_raw_gradient_out(mode: str) -> None:
    one, none = Matrix(mode), Matrix("none")
    for t in (1, 2, 3):
        one.step(random(S, L, seed=t), step=t, omega=1.0)
        none.step(random(S, L, seed=t), step=t, omega=1.0)
    torch.testing.assert_close(one.weight, none.weight)


@pytest.mark.parametrize("feedback", [False, "fp32"])
@pytest.mark.parametrize("mode", MODES)
def test_measured_energies_are_those_of_the_gradient_without_the_error(mode: str, feedback: Any) -> None:
    matrix, gradient = Matrix(mode, feedback), random(S, L, seed=1)
    matrix.step(gradient)
    assert matrix.fragment.waiting.energies is None
    if feedback:  # with a part inside the basis, as after a refresh
        matrix.state["error"].copy_(random(S * L, seed=3))
    matrix.step(gradient, measure=True, step=2)
    assert matrix.fragment.waiting.energies is not None
    inside, energy = (float(value) for value in matrix.fragment.waiting.energies)
    assert inside == pytest.approx(float((matrix.fragment.basis.mT @ gradient).square().sum()))
    assert energy == pytest.approx(float(gradient.square().sum()))


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=10, deadline=None)
@given(row=st.integers(1, S - 1), column=st.integers(1, L - 1))
def test_tiles_of_a_matrix_are_updated_as_the_matrix(mode: str, row: int, column: int) -> None:
    """An update is elementwise but for the basis: any four tiles give what the whole gives."""
    weight, gradient, basis = random(S, L, seed=5), random(S, L, seed=1), orthonormal(S, R, 9)
    update = Update(random(R, L, seed=2))
    if mode == "full_rank":
        update.den_mean = random(1, L, seed=3).abs() + 1
    if mode == "factored":
        update.gradient, update.mean = basis.mT @ gradient, torch.tensor(0.7).double()
        update.row, update.col = random(S, seed=4).abs(), random(L, seed=6).abs()
    pieces = weight.clone()
    now = replace(SETTINGS, qh_mode=mode)
    apply_update_(weight, gradient, basis, update, now)
    for s in (slice(0, row), slice(row, S)):
        for l in (slice(0, column), slice(column, L)):  # noqa: E741
            part = replace(update, coordinates=update.coordinates[:, l])
            part.den_mean = None if update.den_mean is None else update.den_mean[:, l]
            if update.gradient is not None and update.row is not None and update.col is not None:
                part.gradient, part.row, part.col = update.gradient[:, l], update.row[s], update.col[l]
            apply_update_(pieces[s, l], gradient[s, l], basis[s], part, now)
    torch.testing.assert_close(pieces, weight, rtol=0, atol=1e-14)


# -- AdamW ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_dense_parameter_is_stepped_as_torch_adamw(weight_decay: float) -> None:
    weight, moments = random(4, 3, seed=2), [torch.zeros(4, 3, dtype=torch.float64) for _ in range(2)]
    theirs = torch.nn.Parameter(weight.clone())
    adamw = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=weight_decay)
    for t in range(1, 6):
        gradient = random(4, 3, seed=10 + t)
        theirs.grad = gradient.clone()
        adamw.step()
        adamw_step_(weight, gradient, *moments, replace(SETTINGS, step=t, weight_decay=weight_decay))
    torch.testing.assert_close(weight, theirs.detach(), rtol=0, atol=1e-14)


# -- moments in another basis --------------------------------------------------------------------------


def moments(step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Moments as `step` gradients leave them."""
    u, v = torch.zeros(R, L, dtype=torch.float64), torch.zeros(R, L, dtype=torch.float64)
    for t in range(step):
        g = random(R, L, seed=100 * seed + t)
        u.lerp_(g, 0.1)
        v.lerp_(g * g, 0.01)
    return u, v


@settings(max_examples=30, deadline=None)
@given(step=st.integers(1, 200), seed=st.integers(0, 99))
def test_rotated_second_moments_stay_non_negative_and_first_moments_follow_the_space(step: int, seed: int) -> None:
    u, v = moments(min(step, 5), seed)
    before = u.clone()
    old, new = orthonormal(S, R, seed), orthonormal(S, R, seed + 1)
    rotate_moments_(u, v, new.mT @ old, SETTINGS.betas, step)
    assert bool((v >= 0).all())
    torch.testing.assert_close(lift(new, u), new @ new.mT @ lift(old, before))


def test_the_same_basis_leaves_the_moments_as_they_are_and_swapped_columns_swap_them() -> None:
    Q = torch.eye(S, R, dtype=torch.float64)
    for new, order in ((Q, [0, 1]), (Q.flip(-1), [1, 0]), (-Q, None)):
        u, v = moments(4)
        before_u, before_v = u.clone(), v.clone()
        rotate_moments_(u, v, new.mT @ Q, SETTINGS.betas, 4)
        sign, order = (-1, [0, 1]) if order is None else (1, order)
        torch.testing.assert_close(u, sign * before_u[order])
        torch.testing.assert_close(v, before_v[order])


def test_a_basis_orthogonal_to_the_old_one_forgets_the_moments() -> None:
    Q = orthonormal(S, 2 * R, 3)
    u, v = moments(4)
    rotate_moments_(u, v, Q[:, R:].mT @ Q[:, :R], SETTINGS.betas, 4)
    assert float(u.abs().max()) < 1e-14 and float(v.abs().max()) < 1e-14


def test_a_variance_that_turns_out_negative_counts_by_its_size() -> None:
    """u^ = (2, -1.5) and v^ = (1, 2.25): u^ is recent, v^ is not; .36 (1 - 4) + .64 (0) + (.6*2 - .8*1.5)^2."""
    u, v = 0.1 * torch.tensor([[2.0], [-1.5]]).double(), 0.01 * torch.tensor([[1.0], [2.25]]).double()
    rotate_moments_(u, v, torch.tensor([[0.6, 0.8], [-0.8, 0.6]]).double(), SETTINGS.betas, 1)
    assert (v / 0.01).flatten().tolist() == pytest.approx([1.08, abs(0.64 * -3 + 2.5**2)])


def test_the_rotation_acts_on_bias_corrected_moments() -> None:
    """One step in, v^ = u^^2: there is no variance, and the new v^ is the square of the new u^."""
    u, v = moments(1)
    rotate_moments_(u, v, orthonormal(S, R, 2).mT @ orthonormal(S, R, 1), SETTINGS.betas, 1)
    torch.testing.assert_close(v / 0.01, (u / 0.1).square())


def test_without_an_executed_step_there_is_nothing_to_rotate() -> None:
    u, v = torch.zeros(R, L), torch.zeros(R, L)
    rotate_moments_(u, v, torch.tensor([[0.6, 0.8], [-0.8, 0.6]]), SETTINGS.betas, 0)
    assert not bool(u.any()) and not bool(v.any())


@settings(max_examples=30, deadline=None)
@given(beta=st.floats(0.0, 0.9999), step=st.integers(1, 1000), common=st.integers(1, 1000))
def test_a_common_step_count_keeps_the_bias_corrected_value(beta: float, step: int, common: int) -> None:
    factor = rescale_bias_correction(beta, step, common)
    assert factor * (1 - beta**step) == pytest.approx(1 - beta**common)
    assert rescale_bias_correction(beta, 0, common) == 1.0


@pytest.mark.parametrize("kind", [project, lift])
def test_projecting_what_was_lifted_gives_it_back(kind: Any) -> None:
    Q, x = orthonormal(S, R, 4), random(R, L, seed=7)
    torch.testing.assert_close(project(Q, lift(Q, x)), x)
    assert kind(Q, x if kind is lift else random(S, L)).shape == ((S, L) if kind is lift else (R, L))
