"""`lordo_ds.core.reference` against design.md section 2 worked out by hand, in numbers and in numpy.

`Longhand` below is written from the equations, not from the code: it keeps the bias-corrected averages u^ and
v^ themselves, where the code keeps the raw ones, so that averaging, a common t and a rotation look different.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lordo_ds.config import LordoConfig
from lordo_ds.core.grouping import ParameterFacts, plan_parameters
from lordo_ds.core.reference import Reference

Gradients = list[dict[str, Tensor] | None]
MODES = ("full_rank", "factored", "low_rank", "none")
# Plain numbers: c1 = .5, .75, .875 and c2 = .25, .4375, .578125 after one, two and three steps.
SETTINGS: dict[str, Any] = {
    "lr": 0.1,
    "betas": [0.5, 0.75],
    "eps": 1.0,
    "omega": 0.25,
    "sync_interval": 3,
    "basis_update": "svd",
}


def tensor(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def zeros(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def reference(weights: list[Tensor], **settings: Any) -> Reference:
    """A reference on one parameter "w" per replica; the weights are copied."""
    config = LordoConfig.parse({**SETTINGS, **settings})
    plans = plan_parameters(config, [ParameterFacts("w", tuple(weights[0].shape))])
    return Reference(config, plans, [{"w": weight.clone()} for weight in weights])


def gradients(*matrices: Tensor | None) -> Gradients:
    """One gradient per replica; None for a replica that skips the step."""
    return [None if matrix is None else {"w": matrix} for matrix in matrices]


def moved_to(target: Reference, weights: list[Tensor]) -> None:
    """Set the replicas' weights by hand, so that the pseudo-gradient of the next sync is known."""
    for replica, weight in zip(target.weights, weights, strict=True):
        replica["w"].copy_(weight)


def same(actual: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# -- one inner step in plain numbers -------------------------------------------------------------------

# Orthogonal rows of squared lengths 20 and 6: the leading left direction is e1, and positive by convention.
# g = (4, 0, -2);  u^ = g;  v^ = (16, 0, 4);  den = (5, 1, 3);  N = (.8, 0, -2/3)
FIRST = tensor([[4, 0, -2], [1, 1, 2]])
# g = (1, 3, 0): with u^ = (.5*.5*g1 + .5*g2) / .75 = (g1 + 2 g2) / 3 and v^ = (3 g1^2 + 4 g2^2) / 7
SECOND = tensor([[1, 3, 0], [0, 2, 1]])
U2 = np.array([6 / 3, 6 / 3, -2 / 3])
V2 = np.array([(3 * 16 + 4) / 7, 36 / 7, 12 / 7])
DEN2 = np.sqrt(V2) + 1

# Moves of W by the first step, in units of -lr; omega = 1/4.
FIRST_MOVES = {
    "none": [[0.8, 0, -2 / 3], [0, 0, 0]],
    # with r = 1 the mean over the coordinates is den itself: G/den is (.8, 0, -2/3) and (1/5, 1, 2/3)
    "full_rank": [[0.8, 0, -2 / 3], [0.15, 0.75, 0.5]],
    # u^ = Q^T G at the first step: the mixture is N
    "low_rank": [[0.8, 0, -2 / 3], [0, 0, 0]],
    # rows' mean squares 20/3 and 2, mean 13/3; columns' 17/2, 1/2, 4: row 2 over its own preconditioner
    "factored": [
        [0.8, 0, -2 / 3],
        [0.75 * x / (((2 / (13 / 3)) * c) ** 0.5 + 1) for x, c in ((1, 8.5), (1, 0.5), (2, 4))],
    ],
}


@pytest.mark.parametrize("mode", MODES)
def test_the_first_step_moves_the_weights_as_worked_out_by_hand(mode: str) -> None:
    steps = reference([zeros((2, 3))], rank=1, qh_mode=mode)
    steps.step(gradients(FIRST))
    same(steps.state[0]["w"]["Q"], [[1], [0]])
    same(steps.weights[0]["w"], -0.1 * np.array(FIRST_MOVES[mode]))


@pytest.mark.parametrize("mode", MODES)
def test_the_second_step_weighs_the_momentum_and_the_raw_gradient_as_worked_out_by_hand(mode: str) -> None:
    steps = reference([zeros((2, 3))], rank=1, qh_mode=mode)
    steps.step(gradients(FIRST))
    before = steps.weights[0]["w"].clone()
    steps.step(gradients(SECOND))
    g1, g2 = SECOND.numpy()
    moves = {
        "none": [U2 / DEN2, 0 * g2],
        "full_rank": [(0.75 * g1 + 0.25 * U2) / DEN2, 0.75 * g2 / DEN2],
        "low_rank": [(0.75 * g1 + 0.25 * U2) / DEN2, 0 * g2],
    }
    # rows: v^-like means of (20/3, 10/3) and (2, 5/3); columns: of (17/2, 1/2), (1/2, 13/2) and (4, 1/2)
    row = (3 * np.array([20 / 3, 2]) + 4 * np.array([10 / 3, 5 / 3])) / 7
    col = (3 * np.array([8.5, 0.5, 4]) + 4 * np.array([0.5, 6.5, 0.5])) / 7
    moves["factored"] = [moves["low_rank"][0], 0.75 * g2 / (np.sqrt(row[1] * col / row.mean()) + 1)]
    same(steps.weights[0]["w"] - before, -0.1 * np.array(moves[mode]))


def test_the_full_rank_term_is_divided_by_the_mean_over_the_coordinates_of_each_column() -> None:
    # Orthogonal rows, so Q = (e1, e2); den = |g| + 1 is (5, 4, 1, 1) and (2.5, 3, 1, 1).
    gradient = tensor([[4, 3, 0, 0], [-1.5, 2, 0, 0], [0, 0, 0.5, 0]])
    steps = reference([zeros((3, 4))], rank=2)
    steps.step(gradients(gradient))
    same(steps.state[0]["w"]["Q"].abs(), [[1, 0], [0, 1], [0, 0]])
    mean = np.array([3.75, 3.5, 1, 1])
    momentum = np.array([[4 / 5, 3 / 4, 0, 0], [-1.5 / 2.5, 2 / 3, 0, 0], [0, 0, 0, 0]])
    same(steps.weights[0]["w"], -0.1 * (0.75 * gradient.numpy() / mean + 0.25 * momentum))


def test_weight_decay_is_decoupled_and_comes_before_the_step() -> None:
    weight = tensor([[1.0, 2, -3], [4, 0, 5]])
    steps = reference([weight], rank=1, qh_mode="none", weight_decay=0.5)
    steps.step(gradients(FIRST))
    same(steps.weights[0]["w"], weight.numpy() * 0.95 - 0.1 * np.array(FIRST_MOVES["none"]))


def test_a_learning_rate_given_to_the_step_wins_and_zero_is_one() -> None:
    steps = reference([zeros((2, 3))], rank=1, qh_mode="none")
    steps.step(gradients(FIRST), lr=0.0)
    same(steps.weights[0]["w"], np.zeros((2, 3)))
    steps = reference([zeros((2, 3))], rank=1, qh_mode="none")
    steps.step(gradients(FIRST), lr=0.3)
    same(steps.weights[0]["w"], -0.3 * np.array(FIRST_MOVES["none"]))


def test_error_feedback_keeps_what_projection_drops_and_the_gradient_term_does_not_see_it() -> None:
    kept = reference([zeros((2, 3))], rank=1, error_feedback="fp32")
    plain = reference([zeros((2, 3))], rank=1)
    for one in (kept, plain):
        one.step(gradients(FIRST))
        one.step(gradients(SECOND))
    same(kept.state[0]["w"]["E"], [[0, 0, 0], [1, 3, 3]])  # the second rows of both gradients
    same(kept.weights[0]["w"], plain.weights[0]["w"].numpy())  # E is orthogonal to an unchanged basis


def test_a_gradient_that_is_zero_leaves_the_weights_finite_in_every_mode() -> None:
    for mode in MODES:
        steps = reference([tensor([[1.0, 2, 3], [4, 5, 6]])], rank=1, qh_mode=mode, eps=1e-8)
        steps.step(gradients(zeros((2, 3))))
        same(steps.weights[0]["w"], [[1, 2, 3], [4, 5, 6]])
        assert steps.state[0]["w"]["Q"] is None


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_basis_comes_from_the_first_gradient_that_has_a_direction(mode: str, replicas: int) -> None:
    """Until then a step is weight decay alone, and what follows is as if training began there."""
    settings = {"rank": 1, "qh_mode": mode, "weight_decay": 0.5, "sync_interval": 100}
    late = reference([tensor([[1.0, 2, 3], [4, 5, 6]])] * replicas, **settings)
    none = zeros((2, 3))
    for _ in range(2):
        late.step(gradients(*[none] * replicas))
    decayed = tensor([[1.0, 2, 3], [4, 5, 6]]) * 0.95**2
    same(late.weights[0]["w"], decayed.numpy())
    state = late.state[0]["w"]
    assert state["Q"] is None and state["t"] == 0 and not bool(state["u"].any()) and not bool(state["row"].any())
    fresh = reference([decayed] * replicas, **settings)
    # One replica's own gradient may still be zero: the average has a direction.
    own = [FIRST, none][:replicas]
    for one in (late, fresh):
        one.step(gradients(*own))
        one.step(gradients(*[SECOND] * replicas))
    for m in range(replicas):
        same(late.weights[m]["w"], fresh.weights[m]["w"].numpy())
        same(late.state[m]["w"]["Q"], [[1], [0]])  # FIRST leads with e1
        assert late.state[m]["w"]["t"] == 2


def test_a_matrix_that_waits_is_asked_for_a_basis_in_the_first_steps_at_powers_of_two_and_at_syncs() -> None:
    found = []
    for first in range(1, 14):
        steps = reference([START, START], rank=2, sync_interval=12)
        for n in range(1, 14):
            steps.step(gradients(*[MEAN * (n >= first)] * 2))
            if steps.state[0]["w"]["Q"] is not None:
                found.append((first, n))
                break
    assert found == [*((n, n) for n in range(1, 9)), *((n, 12) for n in range(9, 13))]


def test_the_first_executed_step_may_give_a_basis_whenever_it_comes() -> None:
    """fp16 may overflow in many steps at the start."""
    steps = reference([START, START], rank=2, sync_interval=100)
    for _ in range(10):
        steps.step(gradients(None, None))
    steps.step(gradients(None, MEAN))
    assert steps.state[0]["w"]["Q"] is not None and steps.n == 11


def test_a_basis_on_columns_is_the_transposed_problem() -> None:
    wide = reference([zeros((2, 3)), zeros((2, 3))], rank=1, qh_mode="factored", error_feedback="fp32")
    tall = reference([zeros((3, 2)), zeros((3, 2))], rank=1, qh_mode="factored", error_feedback="fp32")
    for first, second in ((FIRST, SECOND), (SECOND, FIRST), (FIRST, -SECOND), (FIRST, FIRST)):
        wide.step(gradients(first, second))
        tall.step(gradients(first.mT.contiguous(), second.mT.contiguous()))
    assert (wide.plans[0].side, tall.plans[0].side) == ("rows", "columns")
    same(tall.weights[0]["w"].mT, wide.weights[0]["w"].numpy())


# -- steps, a sync and a step, longhand ----------------------------------------------------------------


def fold(mean: Any, value: Any, beta: float, t: int) -> Any:
    """The bias-corrected average of t values after one more."""
    return (beta * (1 - beta**t) * mean + (1 - beta) * value) / (1 - beta ** (t + 1))


class Longhand:
    """One matrix of one replica with the basis on its rows: section 2 in numpy, averages bias-corrected."""

    def __init__(self, weight: Tensor, settings: dict[str, Any]) -> None:
        self.W, self.settings, self.t = weight.numpy().copy(), settings, 0
        self.Q: Any = None
        self.E, self.u, self.v, self.row, self.col = 0.0 * self.W, 0.0, 0.0, 0.0, 0.0

    def inner(self, gradient: Tensor) -> None:
        S, G, Q = self.settings, gradient.numpy(), self.Q
        (b1, b2), lr, omega, mode = S["betas"], S["lr"], S["omega"], S["qh_mode"]
        inside = Q @ Q.T
        A = G + self.E if S["error_feedback"] else G
        if S["error_feedback"]:
            self.E = A - inside @ A
        g = np.einsum("ik,ij->kj", Q, A)
        self.u, self.v = fold(self.u, g, b1, self.t), fold(self.v, g * g, b2, self.t)
        self.row = fold(self.row, (G * G).mean(axis=1), b2, self.t)
        self.col = fold(self.col, (G * G).mean(axis=0), b2, self.t)
        self.t += 1
        den = np.sqrt(self.v) + S["eps"]
        if mode == "none":
            move = Q @ (self.u / den)
        elif mode == "full_rank":
            move = (1 - omega) * G / den.mean(axis=0) + omega * (Q @ (self.u / den))
        else:
            move = Q @ (((1 - omega) * Q.T @ G + omega * self.u) / den)
        if mode == "factored":
            preconditioner = np.sqrt(np.outer(self.row, self.col) / self.row.mean()) + S["eps"]
            move = move + (1 - omega) * (G - inside @ G) / preconditioner
        self.W = (1 - lr * S["weight_decay"]) * self.W - lr * move

    def rotate(self, basis: Any) -> None:
        R, self.Q = basis.T @ self.Q, basis
        variance = (R * R) @ (self.v - self.u * self.u)
        self.u = R @ self.u
        self.v = abs(variance + self.u * self.u)


def average(replicas: list[Longhand]) -> None:
    """Bias-corrected averages are simply averaged, and every replica takes the largest t."""
    for name in ("u", "v", "row", "col"):
        mean = np.mean([getattr(replica, name) for replica in replicas], axis=0)
        for replica in replicas:
            setattr(replica, name, mean)
    for replica in replicas:
        replica.t = max(other.t for other in replicas)


# Rows 1 and 2 of the mean gradient are orthogonal and lead, so the first basis is (e1, e2).
MEAN = tensor([[4, 0, -2, 1], [0, 3, 1, 2], [0, -0.5, 0.3, 0.6]])
OWN = tensor([[1, -1, 0.5, 0], [0.2, 0.4, -1, 1], [0.3, 0.6, -0.9, 1.2]])
LATER = tensor([[1, 2, -1, 0.5], [-0.5, 1, 0.25, -2], [1, -1, 2, 0]])
# The pseudo-gradient a (2, 4, 4, 0) + b (2, 1, -2, 0) with a = (2, 2, 1) / 3 and b = (-2, 1, 2) / 3 has the
# leading left space (a, b): singular values 6 and 3, signs towards the first basis.
NEW_BASIS = np.array([[2, -2], [2, 1], [1, 2]]) / 3
PSEUDO_GRADIENT = tensor(NEW_BASIS) @ tensor([[2, 4, 4, 0], [2, 1, -2, 0]])
ROTATION = np.array([[2, 2], [-2, 1]]) / 3
START = tensor([[1.0, -1, 2, 0], [0, 1, 1, -2], [3, 0, -1, 1]])


@pytest.mark.parametrize("error_feedback", [False, "fp32"])
@pytest.mark.parametrize("mode", MODES)
def test_two_replicas_with_a_skip_a_sync_and_a_step_after_it_follow_the_equations(
    mode: str, error_feedback: Any
) -> None:
    extra = {"qh_mode": mode, "error_feedback": error_feedback, "weight_decay": 0.2}
    steps = reference([START, START], rank=2, **extra, outer={"lr": 0.5, "momentum": 0.5})
    by_hand = [Longhand(START, {**SETTINGS, **extra}) for _ in range(2)]

    steps.step(gradients(MEAN + OWN, MEAN - OWN))
    for replica, gradient in zip(by_hand, (MEAN + OWN, MEAN - OWN), strict=True):
        replica.Q = np.eye(3)[:, :2]
        replica.inner(gradient)
    steps.step(gradients(LATER, None))  # replica 1 skips: t is 2 and 1
    by_hand[0].inner(LATER)
    for m in range(2):
        same(steps.state[m]["w"]["Q"], np.eye(3)[:, :2])
        same(steps.weights[m]["w"], by_hand[m].W)

    moved_to(steps, [START - PSEUDO_GRADIENT - OWN, START - PSEUDO_GRADIENT + OWN])
    steps.step(gradients(None, None))  # the due step: nothing but the sync
    average(by_hand)
    for replica in by_hand:
        replica.rotate(NEW_BASIS)
        replica.W = START.numpy() - 0.75 * PSEUDO_GRADIENT.numpy()  # .5 (D + .5 m) with m = D
    assert np.allclose(NEW_BASIS.T @ np.eye(3)[:, :2], ROTATION)
    for m in range(2):
        state = steps.state[m]["w"]
        assert state["t"] == 2
        same(state["Q"], NEW_BASIS)
        same(state["u"], 0.75 * by_hand[m].u)
        same(state["v"], 0.4375 * by_hand[m].v)
        same(steps.weights[m]["w"], by_hand[m].W)
        same(steps.anchor["w"], by_hand[m].W)
    if error_feedback:
        assert not torch.equal(steps.state[0]["w"]["E"], steps.state[1]["w"]["E"])  # a sync leaves it alone

    steps.step(gradients(LATER, MEAN))  # projects A = G + E: E is no longer orthogonal to the basis
    for m, gradient in enumerate((LATER, MEAN)):
        by_hand[m].inner(gradient)
        same(steps.weights[m]["w"], by_hand[m].W)
        if error_feedback:
            same(steps.state[m]["w"]["E"], by_hand[m].E)


def test_moments_in_the_rotated_basis_in_plain_numbers() -> None:
    # One replica, one step: g = rows 1 and 2 of the gradient, u^ = g, v^ = g^2, so that the variance is zero
    # and v^' = (R u^)^2. Column 1: g = (4, 1) -> R g = (10/3, -7/3).
    steps = reference([zeros((3, 4))], rank=2, qh_mode="none", sync_interval=2)
    steps.step(gradients(tensor([[4, 0, 0, 2], [1, 3, 0, -2], [0, 0, 0, 0]])))
    first = steps.state[0]["w"]["Q"]
    moved_to(steps, [-PSEUDO_GRADIENT])
    steps.step(gradients(None))
    state = steps.state[0]["w"]
    # The first basis spans (e1, e2) in a frame of its own; what the rotation promises does not depend on it.
    lifted = tensor(NEW_BASIS) @ (state["u"] / 0.5)
    projector = tensor(NEW_BASIS @ NEW_BASIS.T)
    same(lifted, projector.numpy() @ [[4, 0, 0, 2], [1, 3, 0, -2], [0, 0, 0, 0]])
    same((state["u"] / 0.5).abs()[:, 0], [10 / 3, 7 / 3])
    same(state["v"], 0.25 * (state["u"] / 0.5).square().numpy())
    same(first[2], [0, 0])


def test_the_variance_is_mixed_by_the_squared_rotation() -> None:
    # With a mean of zero and variances (9, 4) in column 1, v^' = R^2 (9, 4) = (4 (9 + 4) / 9, (4*9 + 4) / 9).
    steps = reference([zeros((3, 4))], rank=2, qh_mode="none", sync_interval=2)
    steps.step(gradients(MEAN))
    state = steps.state[0]["w"]
    state["u"] = zeros((2, 4))
    state["v"] = 0.25 * tensor([[9, 0, 0, 0], [4, 0, 0, 0]])
    moved_to(steps, [-PSEUDO_GRADIENT])
    steps.step(gradients(None))
    same(state["v"][:, 0] / 0.25, [52 / 9, 40 / 9])


def test_a_variance_that_turns_out_negative_counts_by_its_size() -> None:
    # u^ = (1, -1), v^ = (1/4, 1) in column 1: R u^ = (0, -1) and R^2 (v^ - u^^2) = (-1/3, -1/3).
    steps = reference([zeros((3, 4))], rank=2, qh_mode="none", sync_interval=2)
    steps.step(gradients(MEAN))
    state = steps.state[0]["w"]
    state["u"] = 0.5 * tensor([[1, 0, 0, 0], [-1, 0, 0, 0]])
    state["v"] = 0.25 * tensor([[0.25, 0, 0, 0], [1, 0, 0, 0]])
    moved_to(steps, [-PSEUDO_GRADIENT])
    steps.step(gradients(None))
    same(state["v"][:, 0] / 0.25, [1 / 3, 2 / 3])


def test_the_power_refresh_takes_one_warm_started_iteration() -> None:
    # D D^T = 25 a a^T + 4 b b^T, a = (.6, .8), b = (-.8, .6): on (e1, e2) [[11.56, 10.08], [10.08, 17.44]].
    # Q' is its first column, normalised, and the perpendicular.
    a, b = tensor([0.6, 0.8, 0]), tensor([-0.8, 0.6, 0])
    D = 5 * torch.outer(a, tensor([1, 0, 0, 0])) + 2 * torch.outer(b, tensor([0, 1, 0, 0]))
    steps = reference([zeros((3, 4))], rank=2, sync_interval=2)
    steps.step(gradients(MEAN))
    steps.state[0]["w"]["Q"] = torch.eye(3, 2, dtype=torch.float64)
    steps.config = LordoConfig.parse({**SETTINGS, "rank": 2, "sync_interval": 2, "basis_update": "power"})
    moved_to(steps, [-D])
    steps.step(gradients(None))
    first = np.array([11.56, 10.08]) / (11.56**2 + 10.08**2) ** 0.5
    same(steps.state[0]["w"]["Q"], [[first[0], -first[1]], [first[1], first[0]], [0, 0]])


# -- the outer step ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outer", "first", "second"),
    [
        ({}, [1, 0], [0, 1]),
        ({"lr": 0.5, "momentum": 0.5}, [0.75, 0], [0.125, 0.75]),
        ({"lr": 0.5, "momentum": 0.5, "nesterov": False}, [0.5, 0], [0.25, 0.5]),
        ({"lr": 2.0}, [2, 0], [0, 2]),
    ],
)
def test_the_outer_step_in_plain_numbers(outer: dict[str, Any], first: list[float], second: list[float]) -> None:
    """Coefficients of D1 and D2 in what each of two syncs subtracts; m = D1, then mu D1 + D2."""
    D1, D2 = PSEUDO_GRADIENT, LATER
    for low_rank in ({}, {"exclude": ["w"]}):  # the outer step is the same for dense parameters
        steps = reference([START, START], rank=2, sync_interval=1, outer=outer, low_rank=low_rank)
        moved_to(steps, [START - D1 - OWN, START - D1 + OWN])
        steps.step(gradients(None, None))
        anchor = START - first[0] * D1
        same(steps.weights[0]["w"], anchor.numpy())
        moved_to(steps, [anchor - D2, anchor - D2])
        steps.step(gradients(None, None))
        same(steps.weights[1]["w"], (anchor - second[0] * D1 - second[1] * D2).numpy())


def test_warm_up_averages_plainly_and_the_outer_momentum_starts_after_it() -> None:
    D1, D2 = PSEUDO_GRADIENT, LATER
    outer = {"lr": 0.5, "momentum": 0.5}
    steps = reference([START, START], rank=2, sync_interval=2, outer=outer, sync_warmup_steps=1)
    moved_to(steps, [START - D1 - OWN, START - D1 + OWN])
    steps.step(gradients(None, None))
    same(steps.weights[0]["w"], (START - D1).numpy())
    same(steps.momentum["w"], np.zeros((3, 4)))
    moved_to(steps, [START - D1 - D2, START - D1 - D2])
    steps.step(gradients(None, None))
    same(steps.weights[0]["w"], (START - D1 - 0.75 * D2).numpy())
    same(steps.momentum["w"], D2.numpy())


def test_warm_up_leaves_the_basis_alone_but_averages_the_moments_at_every_step() -> None:
    steps = reference([START, START], rank=2, sync_interval=3, sync_warmup_steps=2)
    for _ in range(2):
        steps.step(gradients(MEAN + OWN, MEAN - OWN))
        same(steps.state[0]["w"]["Q"], np.eye(3)[:, :2])
        same(steps.state[0]["w"]["u"], steps.state[1]["w"]["u"].numpy())
    steps.step(gradients(LATER, LATER + OWN))
    assert not torch.allclose(steps.state[0]["w"]["Q"], torch.eye(3, 2, dtype=torch.float64))


# -- where the basis comes from ------------------------------------------------------------------------


def at_the_sync(D: Tensor, **settings: Any) -> Reference:
    """One replica, one step with MEAN (basis (e1, e2)), and a sync whose pseudo-gradient is D."""
    steps = reference([zeros((3, 4))], sync_interval=2, **{"rank": 2, **settings})
    steps.step(gradients(MEAN))
    moved_to(steps, [-D])
    steps.step(gradients(None))
    return steps


def test_the_complement_basis_leads_what_the_old_basis_missed_and_forgets_the_moments() -> None:
    # rank 1: Q = e1, and outside it D has the rows (3, 0) and (4, 0) up to smaller ones: (0, .6, .8).
    D = tensor([[50, 60, 70, 80], [3, 0, 0.8, 0], [4, 0, -0.6, 0]])
    steps = at_the_sync(D, rank=1, basis_source="complement")
    Q = steps.state[0]["w"]["Q"]
    same(Q @ Q.mT, np.outer([0, 0.6, 0.8], [0, 0.6, 0.8]))
    same(steps.state[0]["w"]["u"], np.zeros((1, 4)))
    same(steps.state[0]["w"]["v"], np.zeros((1, 4)))


def test_missing_directions_are_filled_up_with_the_old_basis_made_orthogonal() -> None:
    # D has one direction, a = (2, 2, 1) / 3. The old basis' e1, less its part along a, is (5, -4, -2) / 9.
    a = np.array([2, 2, 1]) / 3
    Q = at_the_sync(torch.outer(tensor(a), tensor([1, 2, 3, 4]))).state[0]["w"]["Q"]
    filled = np.array([5, -4, -2]) / 9
    same(Q[:, 0], a)
    same(Q @ Q.mT, np.outer(a, a) + np.outer(filled, filled) / (filled @ filled))


def test_a_zero_pseudo_gradient_keeps_basis_and_moments() -> None:
    state = at_the_sync(zeros((3, 4))).state[0]["w"]
    same(state["Q"], np.eye(3)[:, :2])
    same(state["u"], 0.5 * MEAN[:2].numpy())
    same(state["v"], 0.25 * MEAN[:2].square().numpy())


def test_local_projection_keeps_each_replicas_own_basis_and_moments() -> None:
    other = MEAN[[2, 0, 1]]  # leads with (e2, e3)
    steps = reference([START, START], rank=2, projection="local", qh_mode="factored", sync_interval=2)
    steps.step(gradients(MEAN, other))
    for m, columns in enumerate(([0, 1], [1, 2])):
        Q = steps.state[m]["w"]["Q"]
        same(Q @ Q.mT, np.diag([1.0 if i in columns else 0.0 for i in range(3)]))
    row = [steps.state[m]["w"]["row"].clone() for m in range(2)]
    swapped = PSEUDO_GRADIENT.flip(0)
    moved_to(steps, [START - PSEUDO_GRADIENT, START - swapped])
    steps.step(gradients(None, None))
    for m, basis in enumerate((NEW_BASIS, NEW_BASIS[::-1])):  # each from its own anchor - W_m
        Q = steps.state[m]["w"]["Q"]
        same(Q @ Q.mT, basis @ basis.T)
        same(steps.weights[m]["w"], (START - (PSEUDO_GRADIENT + swapped) / 2).numpy())
        same(steps.state[m]["w"]["row"], row[m].numpy())


@pytest.mark.parametrize("error_feedback", [False, "fp32"])
def test_one_replica_with_the_gradient_source_refreshes_before_it_projects(error_feedback: Any) -> None:
    steps = reference(
        [zeros((3, 4))],
        rank=2,
        sync_interval=2,
        basis_source="gradient",
        error_feedback=error_feedback,
        qh_mode="none",
    )
    steps.step(gradients(MEAN))  # E = row 3 of it
    before = steps.weights[0]["w"].clone()
    # A = G + E leads with a and b only if E is part of it.
    dropped = tensor([[0, 0, 0, 0], [0, 0, 0, 0], MEAN[2].tolist()])
    steps.step(gradients(PSEUDO_GRADIENT - dropped if error_feedback else PSEUDO_GRADIENT))
    same(steps.state[0]["w"]["Q"], NEW_BASIS)
    # g = Q'^T A = ((2, 4, 4, 0), (2, 1, -2, 0)); the old moments, rotated; then one Adam step.
    by_hand = Longhand(zeros((3, 4)), {**SETTINGS, "qh_mode": "none", "error_feedback": False, "weight_decay": 0})
    by_hand.Q = np.eye(3)[:, :2]
    by_hand.inner(MEAN)
    by_hand.rotate(NEW_BASIS)
    by_hand.inner(PSEUDO_GRADIENT)
    same(steps.weights[0]["w"] - before, by_hand.W - before.numpy())


def test_replicas_with_the_gradient_source_share_the_basis_of_their_averaged_gradient() -> None:
    steps = reference([START] * 3, rank=2, sync_interval=2, basis_source="gradient", qh_mode="none")
    steps.step(gradients(MEAN + OWN, MEAN - OWN, MEAN))
    steps.step(gradients(PSEUDO_GRADIENT + OWN, PSEUDO_GRADIENT - OWN, None))  # the third skipped: no say
    for m in range(3):
        same(steps.state[m]["w"]["Q"], NEW_BASIS)


# -- skipped and non-finite replicas -------------------------------------------------------------------


def test_the_first_basis_averages_the_replicas_that_executed_the_step_and_waits_while_none_did() -> None:
    steps = reference([START, START], rank=2)
    steps.step(gradients(None, None))
    assert steps.state[0]["w"]["Q"] is None
    steps.step(gradients(None, MEAN))
    for m in range(2):
        same(steps.state[m]["w"]["Q"], np.eye(3)[:, :2])
    assert [steps.state[m]["w"]["t"] for m in range(2)] == [0, 1]


def test_a_replica_that_never_stepped_takes_part_with_its_weights_but_not_with_its_empty_moments() -> None:
    steps = reference([START, START], rank=2, sync_interval=1, qh_mode="none")
    steps.step(gradients(MEAN, None))
    move = zeros((3, 4))
    move[:2] = MEAN[:2] / (MEAN[:2].abs() + 1)  # N = g / (|g| + eps) at t = 1
    for m in range(2):
        same(steps.weights[m]["w"], (START - 0.1 * move / 2).numpy())
        state = steps.state[m]["w"]
        assert state["t"] == 1
        rotated = state["Q"].mT @ torch.eye(3, 2, dtype=torch.float64) @ MEAN[:2]
        same(state["u"], 0.5 * rotated.numpy())


def test_a_replica_that_is_not_finite_is_left_out_and_adopts_the_others() -> None:
    steps = reference([START] * 3, rank=2, sync_interval=2, error_feedback="fp32")
    steps.step(gradients(MEAN, MEAN + OWN, None))
    moved_to(steps, [START - PSEUDO_GRADIENT, START * float("nan"), START + PSEUDO_GRADIENT / 2])
    steps.step(gradients(None, None, None))
    for m in range(3):
        same(steps.weights[m]["w"], (START - PSEUDO_GRADIENT / 4).numpy())
        assert steps.state[m]["w"]["t"] == 1
        for key in ("Q", "u", "v", "row", "col"):
            same(steps.state[m]["w"][key], steps.state[0]["w"][key].numpy())
    same(steps.state[1]["w"]["E"], np.zeros((3, 4)))
    assert bool(steps.state[0]["w"]["E"].any())


@pytest.mark.parametrize("replicas", [1, 2])
def test_when_no_replica_is_finite_all_return_to_the_anchor_in_the_old_basis(replicas: int) -> None:
    steps = reference([START] * replicas, rank=2, sync_interval=2, outer={"lr": 0.5, "momentum": 0.5})
    steps.step(gradients(*[MEAN] * replicas))
    steps.step(gradients(*[MEAN * float("nan")] * replicas))
    for m in range(replicas):
        state = steps.state[m]["w"]
        same(steps.weights[m]["w"], START.numpy())
        same(state["Q"], np.eye(3)[:, :2])
        assert state["t"] == 0 and not bool(state["u"].any()) and not bool(state["v"].any())


def test_a_first_gradient_that_is_not_finite_has_no_say_in_the_first_basis() -> None:
    steps = reference([START, START], rank=2)
    steps.step(gradients(MEAN * float("nan"), MEAN[[2, 0, 1]]))  # replica 1 leads with (e2, e3)
    Q = steps.state[1]["w"]["Q"]
    same(Q @ Q.mT, np.diag([0, 1, 1]))


# -- dense parameters ----------------------------------------------------------------------------------


def test_a_dense_parameter_of_one_replica_is_stepped_as_torch_adamw() -> None:
    steps = reference([START], weight_decay=0.3, eps=1e-4, low_rank={"exclude": ["w"]}, sync_interval=2)
    weight = torch.nn.Parameter(START.clone())
    adamw = torch.optim.AdamW([weight], lr=0.1, betas=(0.5, 0.75), eps=1e-4, weight_decay=0.3)
    for gradient in (MEAN, LATER, MEAN - OWN, OWN, LATER):
        steps.step(gradients(gradient))
        weight.grad = gradient.clone()
        adamw.step()
        same(steps.weights[0]["w"], weight.detach().numpy())


@pytest.mark.parametrize("averaged", [False, True])
def test_dense_weights_are_averaged_and_their_moments_only_on_demand(averaged: bool) -> None:
    steps = reference([START, START], low_rank={"exclude": ["w"]}, sync_interval=1, average_dense_moments=averaged)
    steps.step(gradients(MEAN, LATER))
    moves = [G / (G.abs() + 1) for G in (MEAN, LATER)]
    for m, own in enumerate((MEAN, LATER)):
        same(steps.weights[m]["w"], (START - 0.1 * (moves[0] + moves[1]) / 2).numpy())
        mean = (MEAN + LATER) / 2
        same(steps.state[m]["w"]["u"], 0.5 * (mean if averaged else own).numpy())
        square = (MEAN.square() + LATER.square()) / 2
        same(steps.state[m]["w"]["v"], 0.25 * (square if averaged else own.square()).numpy())


@pytest.mark.parametrize(
    ("interval", "averaged"), [([2, 4], (True, False)), ([4, 2], (False, True)), ("never", (False, False))]
)
def test_the_two_moments_are_averaged_at_intervals_of_their_own(interval: Any, averaged: tuple[bool, bool]) -> None:
    steps = reference([START, START], rank=2, sync_interval=2, moment_sync_interval=interval, qh_mode="factored")
    steps.step(gradients(MEAN + OWN, MEAN - 2 * OWN))
    moved_to(steps, [START, START])  # no pseudo-gradient: the basis stays
    steps.step(gradients(None, None))
    for key, due in (("u", averaged[0]), ("v", averaged[1]), ("row", averaged[1]), ("col", averaged[1])):
        assert torch.allclose(steps.state[0]["w"][key], steps.state[1]["w"][key]) == due, key


# -- streaming: what a sync of a fragment made lands some steps later ------------------------------------


def test_a_late_sync_adds_what_the_replica_has_done_since_it_began() -> None:
    """K = 3, d = 2, dense: weights 1 and 3 at the sync become their mean 2, and each keeps its own two steps."""
    settings: dict[str, Any] = {"low_rank": {"exclude": [".*"]}, "streaming": {"delay_steps": 2}}
    run = reference([zeros((1, 1)), zeros((1, 1))], **settings)
    for _ in range(3):
        run.step(gradients(zeros((1, 1)), zeros((1, 1))))
        if run.n == 2:
            moved_to(run, [tensor([[1.0]]), tensor([[3.0]])])
    assert [float(weights["w"]) for weights in run.weights] == [1, 3] and float(run.anchor["w"]) == 2
    run.step(gradients(zeros((1, 1)), zeros((1, 1))))
    moved_to(run, [tensor([[1.5]]), tensor([[2.0]])])
    run.step(gradients(zeros((1, 1)), zeros((1, 1))))
    # 2 + (1.5 - 1) and 2 + (2 - 3)
    assert [float(weights["w"]) for weights in run.weights] == [2.5, 1.0]


def test_moments_that_land_late_are_those_of_a_sync_that_was_there_at_once() -> None:
    """Given gradients that do not depend on the weights: b^k of the average, and what the k steps added."""
    settings: dict[str, Any] = {"low_rank": {"exclude": [".*"]}, "average_dense_moments": True}
    draw = torch.Generator().manual_seed(3)
    given = [torch.randn(2, 2, 3, generator=draw, dtype=torch.float64) for _ in range(5)]
    late, at_once = (
        reference([zeros((2, 3)), zeros((2, 3))], **settings, streaming={"delay_steps": delay}) for delay in (2, 0)
    )
    for number, pair in enumerate(given):
        # Replica 1 skips a step before the sync, replica 0 one in flight.
        each = gradients(None if number == 3 else pair[0], None if number == 1 else pair[1])
        late.step(each)
        at_once.step(each)
    for m in range(2):
        ours, theirs = late.state[m]["w"], at_once.state[m]["w"]
        same(ours["u"], theirs["u"])
        same(ours["v"], theirs["v"])
        assert ours["t"] == theirs["t"] == (4 if m == 0 else 5)
    assert late.executed == at_once.executed == [4, 5]


def test_moments_land_in_the_new_basis() -> None:
    """R turns both what the sync had and what came since: the new basis is the old one's second direction."""
    run = reference([zeros((2, 3))], rank=2, streaming={"delay_steps": 1}, qh_mode="none", sync_interval=2)
    draw = torch.Generator().manual_seed(4)
    given = [torch.randn(2, 3, generator=draw, dtype=torch.float64) for _ in range(3)]
    for gradient in given[:2]:
        run.step(gradients(gradient))
    state = run.state[0]["w"]
    Q, u, v = state["Q"], state["u"].clone(), state["v"].clone()
    run.step(gradients(given[2]))
    new, (b1, b2) = run.state[0]["w"], run.config.betas
    R = new["Q"].T @ Q
    g = Q.T @ given[2]
    same(new["u"], R @ (b1 * u + (1 - b1) * g))
    u_hat, v_hat, c2 = u / (1 - b1**2), v / (1 - b2**2), 1 - b2**2
    rotated = c2 * abs((R**2) @ (v_hat - u_hat**2) + (R @ u_hat) ** 2)
    same(new["v"], b2 * rotated + (R**2) @ ((1 - b2) * g**2))
    assert new["t"] == 3
