"""The basis: three methods that agree, orthonormal whatever the matrix, and a fallback that says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lordo_ds.core import basis as basis_module
from lordo_ds.core.basis import Refreshed, overlap, refresh_basis, sketch_seed

METHODS = ("power", "eigh", "svd")
SHAPES = {"tall": (24, 9), "wide": (9, 24), "square": (12, 12)}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


def refresh(matrix: Tensor, previous: Tensor | None, rank: int, **how: Any) -> Refreshed:
    return refresh_basis(matrix, previous, rank, **{"method": "power", "source": "pseudo_gradient", "seed": 5, **how})


def orthonormal(s: int, r: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(s, r, generator=generator, dtype=torch.float64)).Q.to(dtype)


def with_spectrum(
    shape: tuple[int, int], values: list[float], seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values (the rest are zero), and its left singular vectors."""
    left, right = orthonormal(shape[0], len(values), seed), orthonormal(shape[1], len(values), seed + 1)
    return (left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.mT).to(dtype), left


def distance(one: Tensor, other: Tensor) -> float:
    """Sine of the largest angle between two spaces."""
    one, other = one.double(), other.double()
    return float(torch.linalg.matrix_norm(one @ one.mT - other @ other.mT, ord=2))


def defect(basis: Tensor) -> float:
    """How far the columns are from orthonormal."""
    return float((basis.mT @ basis - torch.eye(basis.shape[-1], dtype=basis.dtype)).abs().max())


# -- the three methods ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_method_finds_the_leading_space_where_there_is_a_gap(
    shape: tuple[int, int], method: str, dtype: torch.dtype
) -> None:
    matrix, left = with_spectrum(shape, [4, 3, 2, 1e-4, 5e-5], dtype=dtype)
    for previous in (None, orthonormal(shape[0], 3, 11, dtype)):
        refreshed = refresh(matrix, previous, 3, method=method)
        assert (refreshed.note, refreshed.kept) == ("", False)
        assert refreshed.basis.dtype == dtype
        # Power: (1e-4 / 2)^2 and rounding, after one warm step of a start that is no special one.
        assert distance(refreshed.basis, left[:, :3]) < (1e-5 if dtype == torch.float32 else 1e-7)
        assert defect(refreshed.basis) < TOLERANCE[dtype]


@pytest.mark.parametrize("method", ["eigh", "svd"])
def test_the_exact_methods_find_the_leading_space_at_a_small_gap(method: str) -> None:
    matrix, left = with_spectrum((12, 20), [1.0, 0.9, 0.8, 0.79, 0.5])
    assert distance(refresh(matrix, None, 3, method=method).basis, left[:, :3]) < 1e-10


@pytest.mark.parametrize("source", ["pseudo_gradient", "complement"])
def test_a_power_start_without_a_warm_one_is_two_iterations_from_a_seeded_gaussian_sketch(source: str) -> None:
    matrix = torch.randn(10, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    old = orthonormal(10, 3, 6) if source == "complement" else None
    target = matrix if old is None else matrix - old @ (old.mT @ matrix)
    expected = torch.randn(10, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for _ in range(2):
        expected = torch.linalg.qr(target @ (target.mT @ expected)).Q
    assert distance(refresh(matrix, old, 3, source=source).basis, expected) < 1e-10


def test_repeated_warm_power_steps_converge_to_the_leading_space() -> None:
    matrix, left = with_spectrum((16, 10), [1.0, 0.9, 0.8, 0.4, 0.2])
    basis = orthonormal(16, 3, 4)
    errors = []
    for _ in range(12):
        basis = refresh(matrix, basis, 3).basis
        errors.append(distance(basis, left[:, :3]))
    # Each step takes the error down by (sigma_4 / sigma_3)^2 = 1/4.
    assert errors[-1] < 1e-6
    assert errors[8] / errors[7] == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_the_leading_space_is_a_fixed_point(method: str) -> None:
    matrix, left = with_spectrum((10, 14), [5, 4, 3, 1, 0.5])
    assert torch.allclose(refresh(matrix, left[:, :3], 3, method=method).basis, left[:, :3], atol=1e-12)
    turned = left[:, :3] @ orthonormal(3, 3, 2)  # another basis of the same space
    assert distance(refresh(matrix, turned, 3, method=method).basis, left[:, :3]) < 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 99), st.data())
def test_a_warm_power_step_never_captures_less_energy(s: int, length: int, seed: int, data: Any) -> None:
    r = data.draw(st.integers(1, s))
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(s, length, generator=generator, dtype=torch.float64)
    before = orthonormal(s, r, seed + 1)
    after = refresh(matrix, before, r).basis
    assert float((after.mT @ matrix).norm()) >= float((before.mT @ matrix).norm()) * (1 - 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    directions=st.integers(0, 14),
    exponent=st.sampled_from([-100, -10, 0, 10, 100]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    method=st.sampled_from(METHODS),
    source=st.sampled_from(["pseudo_gradient", "complement"]),
    warm=st.booleans(),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_the_columns_are_orthonormal_whatever_the_matrix(
    shape: tuple[int, int],
    directions: int,
    exponent: int,
    dtype: torch.dtype,
    method: str,
    source: str,
    warm: bool,
    seed: int,
    data: Any,
) -> None:
    s, length = shape
    r = data.draw(st.integers(1, s), label="rank")
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(s, directions, generator=generator, dtype=torch.float64)
    right = torch.randn(directions, length, generator=generator, dtype=torch.float64)
    matrix = (left @ right * 2.0**exponent).to(dtype)
    previous = orthonormal(s, r, seed, dtype) if warm else None
    refreshed = refresh(matrix, previous, r, method=method, source=source)
    if not directions and previous is None:
        assert refreshed.basis is None
        return
    assert refreshed.basis.shape == (s, r) and refreshed.basis.dtype == dtype
    assert defect(refreshed.basis) < 10 * TOLERANCE[dtype]
    assert refreshed.kept == (refreshed.kept and bool(refreshed.note))  # nothing is kept in silence
    if not (source == "complement" and warm):
        found = min(r, s, length, directions)
        # All of the matrix' own space is in the basis where the rank suffices.
        if found == min(s, length, directions):
            outside = matrix.double() - refreshed.basis.double() @ (refreshed.basis.double().mT @ matrix.double())
            assert float(outside.norm()) <= 1e-4 * float(matrix.double().norm())
        assert (found < r) == bool(refreshed.note)


# -- complement ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_the_complement_basis_is_orthogonal_to_the_old_one_and_leads_what_that_missed(
    method: str, dtype: torch.dtype
) -> None:
    old = orthonormal(15, 3, 1)
    new = torch.linalg.qr(orthonormal(15, 5, 2) - old @ (old.mT @ orthonormal(15, 5, 2))).Q
    right = orthonormal(20, 8, 3)
    matrix = 100 * old @ right[:, :3].mT  # what the old basis already sees is by far the largest part
    matrix = matrix + new @ torch.diag(torch.tensor([3, 2, 1, 1e-3, 1e-3]).double()) @ right[:, 3:].mT
    refreshed = refresh(matrix.to(dtype), old.to(dtype), 3, method=method, source="complement")
    assert refreshed.note == ""
    assert float((refreshed.basis.mT @ old.to(dtype)).abs().max()) < 20 * TOLERANCE[dtype] * 100
    assert distance(refreshed.basis, new[:, :3]) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_complement_smaller_than_the_rank_is_taken_whole_and_filled_up_from_the_old_basis(
    method: str,
) -> None:
    old = orthonormal(5, 3, 1)
    matrix = orthonormal(5, 5, 2) @ orthonormal(9, 5, 3).mT
    refreshed = refresh(matrix, old, 3, method=method, source="complement")
    outside = torch.eye(5, dtype=torch.float64) - old @ old.mT
    assert defect(refreshed.basis) < 1e-13
    assert float((outside @ refreshed.basis).norm()) == pytest.approx(2**0.5)  # both missing directions
    assert float((refreshed.basis[:, 2] @ old[:, 0]).abs()) == pytest.approx(1)  # and the leading old column
    assert "only 2 of 3" in refreshed.note and not refreshed.kept


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_inside_the_old_basis_has_no_complement_and_keeps_it(method: str) -> None:
    for s, r in ((8, 3), (6, 6)):  # rank = full side too
        old = orthonormal(s, r, 1, torch.float32)
        matrix = old @ torch.randn(r, 10, generator=torch.Generator().manual_seed(0))
        refreshed = refresh(matrix, old, r, method=method, source="complement")
        assert distance(refreshed.basis, old) < 1e-5
        assert refreshed.note


def test_the_first_complement_basis_is_the_leading_space_of_the_gradient() -> None:
    matrix, left = with_spectrum((10, 14), [5, 4, 1e-3, 1e-3])
    assert distance(refresh(matrix, None, 2, source="complement").basis, left[:, :2]) < 1e-6


# -- deficient, zero, not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_missing_directions_are_filled_up_with_the_leading_old_columns(method: str, dtype: torch.dtype) -> None:
    matrix, left = with_spectrum((12, 9), [3, 1], dtype=dtype)
    old = orthonormal(12, 4, 7, dtype)
    refreshed = refresh(matrix, old, 4, method=method)
    assert "only 2 of 4" in refreshed.note and not refreshed.kept
    assert defect(refreshed.basis) < TOLERANCE[dtype]
    expected = torch.linalg.qr(torch.cat([left, old[:, :2].double()], dim=-1)).Q
    assert distance(refreshed.basis, expected) < 1e-5
    assert distance(refreshed.basis[:, :2], left) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_without_an_old_basis_missing_directions_are_columns_of_the_identity(method: str) -> None:
    matrix = torch.zeros(6, 5)
    matrix[0, 1], matrix[4, 2] = 3, -2
    refreshed = refresh(matrix, None, 4, method=method)
    assert distance(refreshed.basis, torch.eye(6)[:, [0, 4, 1, 2]]) < 1e-6
    assert "only 2 of 4" in refreshed.note


@pytest.mark.parametrize("method", METHODS)
def test_rank_equal_to_the_side_gives_a_square_orthogonal_basis(method: str) -> None:
    matrix, left = with_spectrum((6, 9), [6, 5, 4, 3, 2, 1], dtype=torch.float32)
    refreshed = refresh(matrix, None, 6, method=method)
    assert defect(refreshed.basis) < 2e-6 and refreshed.note == ""
    if method != "power":
        assert float((refreshed.basis.double().mT @ left).abs().diagonal().min()) > 0.9999


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf")])
def test_a_zero_or_non_finite_matrix_keeps_the_previous_basis_and_says_so(value: float, method: str) -> None:
    matrix = torch.zeros(6, 4)
    matrix[2, 3] = value
    old = orthonormal(6, 2, 3, torch.float32)
    refreshed = refresh(matrix, old, 2, method=method)
    assert refreshed.kept and torch.equal(refreshed.basis, old)
    assert ("zero" if value == 0 else "not finite") in refreshed.note
    first = refresh(matrix, None, 2, method=method)
    assert first.kept and first.basis is None


@pytest.mark.parametrize("previous", [True, False], ids=["warm", "first"])
@pytest.mark.parametrize(("method", "function"), [("eigh", "eigh"), ("svd", "svd"), ("power", "qr"), ("power", "eigh")])
def test_a_decomposition_that_fails_keeps_the_previous_basis_and_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, method: str, function: str, previous: bool
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError(f"linalg.{function}: did not\nconverge")

    matrix, _ = with_spectrum((6, 4), [3.0])  # of rank one, so that power too goes on to eigh
    old = orthonormal(6, 2, 3) if previous else None
    monkeypatch.setattr(torch.linalg, function, fail)
    refreshed = refresh(matrix, old, 2, method=method)
    assert refreshed.kept
    assert refreshed.basis is None if old is None else torch.equal(refreshed.basis, old)
    assert "failed" in refreshed.note and "converge" in refreshed.note and "\n" not in refreshed.note


def test_a_decomposition_that_returns_garbage_keeps_the_previous_basis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def garbage(matrix: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = torch.svd(matrix)
        return left * float("nan"), values, right

    monkeypatch.setattr(torch.linalg, "svd", garbage)
    old = orthonormal(6, 2, 3)
    refreshed = refresh(with_spectrum((6, 4), [3.0, 2.0, 1.0])[0], old, 2, method="svd")
    assert refreshed.kept and torch.equal(refreshed.basis, old) and refreshed.note


@pytest.mark.parametrize("source", ["pseudo_gradient", "complement"])
@pytest.mark.parametrize("method", METHODS)
def test_the_basis_does_not_depend_on_the_scale_of_the_matrix(method: str, source: str) -> None:
    """Squares of 1e-30 underflow in fp32, those of 1e30 overflow; powers of two change nothing, bitwise."""
    matrix = with_spectrum((9, 12), [4, 3, 2, 1, 0.5, 0.25], dtype=torch.float32)[0]
    old = orthonormal(9, 3, 5, torch.float32)
    for previous in (None, old):
        expected = refresh(matrix, previous, 3, method=method, source=source)
        for scale in (2.0**-100, 2.0**100):
            scaled = refresh(matrix * scale, previous, 3, method=method, source=source)
            assert scaled.note == expected.note == ""
            assert distance(scaled.basis, expected.basis) < 1e-5
            if source == "pseudo_gradient":
                assert torch.equal(scaled.basis, expected.basis)


def test_a_warm_start_orthogonal_to_everything_new_does_not_get_stuck() -> None:
    matrix, left = with_spectrum((10, 8), [3, 2])
    blind = torch.linalg.qr(torch.cat([left, orthonormal(10, 4, 9)], dim=-1)).Q[:, 2:4]
    assert distance(refresh(matrix, blind, 2).basis, left) < 1e-6


# -- conventions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_columns_point_towards_the_previous_basis_and_at_first_have_a_positive_largest_entry(
    method: str,
) -> None:
    matrix, left = with_spectrum((8, 8), [4, 3, 2, 1e-4])
    flipped = left[:, :3] * torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    warm = refresh(matrix, flipped, 3, method=method).basis
    assert torch.allclose(warm, flipped, atol=1e-6)
    first = refresh(matrix, None, 3, method=method).basis
    largest = first.gather(0, first.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())


@pytest.mark.parametrize("method", METHODS)
def test_signs_of_columns_orthogonal_to_the_previous_basis_are_not_left_to_rounding(method: str) -> None:
    """A complement column has no direction towards the old one beside it but that of rounding noise."""
    matrix = with_spectrum((9, 12), [6, 5, 4, 3, 2, 1])[0]
    old = orthonormal(9, 3, 5)
    expected = refresh(matrix, old, 3, method=method, source="complement").basis
    for seed in range(10):
        noise = 1e-13 * torch.randn(9, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        noisy = refresh(matrix + noise, old, 3, method=method, source="complement").basis
        assert torch.allclose(noisy, expected, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_equal_inputs_give_bitwise_equal_bases_and_neither_they_nor_the_global_generator_change(
    method: str,
) -> None:
    matrix = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
    old, saved, state = orthonormal(16, 4, 2, torch.float32), matrix.clone(), torch.get_rng_state()
    old_saved = old.clone()
    for previous, source in ((None, "pseudo_gradient"), (old, "pseudo_gradient"), (old, "complement")):
        one = refresh(matrix, previous, 4, method=method, source=source).basis
        torch.randn(3, generator=torch.Generator().manual_seed(8))
        two = refresh(matrix.mT.contiguous().mT, previous, 4, method=method, source=source).basis
        assert torch.allclose(one, two, atol=1e-5)
        assert torch.equal(one, refresh(matrix, previous, 4, method=method, source=source).basis)
    assert torch.equal(matrix, saved) and torch.equal(old, old_saved)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_sketch_is_seeded_by_the_basis_side_and_the_step() -> None:
    assert sketch_seed(64, 32) == sketch_seed(64, 32)
    seeds = {sketch_seed(side, step) for side in (2, 64, 65) for step in range(50)}
    assert len(seeds) == 150
    matrix = torch.randn(10, 10, generator=torch.Generator().manual_seed(1))  # no gap: the sketch shows
    assert not torch.equal(refresh(matrix, None, 3, seed=1).basis, refresh(matrix, None, 3, seed=2).basis)


def test_overlap_is_the_mean_squared_cosine_between_the_spaces() -> None:
    old = torch.eye(6, 2, dtype=torch.float64)
    assert overlap(old @ orthonormal(2, 2, 1), old) == pytest.approx(1.0)
    assert overlap(torch.eye(6, dtype=torch.float64)[:, 2:4], old) == 0.0
    tilted = old.clone()
    tilted[:, 1] = torch.tensor([0, 0.6, 0.8, 0, 0, 0])
    assert overlap(tilted, old) == pytest.approx((1 + 0.36) / 2)


def test_filling_up_keeps_the_leading_columns_and_skips_candidates_they_already_span() -> None:
    leading = torch.eye(5, 2, dtype=torch.float64)
    previous = torch.stack([leading[:, 0], leading @ torch.tensor([0.6, 0.8]).double(), torch.eye(5).double()[:, 4]])
    filled = basis_module.fill_up(leading, previous.mT, 4)
    assert torch.equal(filled[:, :2], leading)
    assert torch.allclose(filled[:, 2:], torch.eye(5, dtype=torch.float64)[:, [4, 2]])
