"""The pseudo-gradient and the outer step, in plain numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lordo_ds.config import OuterOptimizer
from lordo_ds.core.outer import orthogonalized, outer_update, pseudo_gradient


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_pseudo_gradient_is_the_anchor_minus_the_weights() -> None:
    anchor, weight, out = tensor(1, 2, 3), tensor(0.5, 2, 5), tensor(0, 0, 0)
    assert torch.equal(pseudo_gradient(anchor, weight), tensor(0.5, 0, -2))
    pseudo_gradient(anchor, weight, out=out)
    assert torch.equal(out, tensor(0.5, 0, -2)) and torch.equal(anchor, tensor(1, 2, 3))


def test_an_anchor_in_low_precision_gives_a_pseudo_gradient_in_that_of_the_weights() -> None:
    anchor = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    D = pseudo_gradient(anchor, torch.tensor([1.0001, 1.9999]))
    assert D.dtype == torch.float32
    torch.testing.assert_close(D, torch.tensor([-0.0001, 0.0001]), rtol=1e-2, atol=0)


def test_without_a_buffer_the_outer_step_is_the_mean_itself() -> None:
    D = tensor(1, -2)
    assert torch.equal(outer_update(D, None, OuterOptimizer()), D)


@pytest.mark.parametrize(
    ("nesterov", "first", "second"),
    # m = D1 = (8, 0), then .5 m + D2 = (4, 4); times a = .25: D + .5 m, or m
    [(True, (3, 0), (0.5, 1.5)), (False, (2, 0), (1, 1))],
)
def test_momentum_in_plain_numbers(nesterov: bool, first: tuple[float, ...], second: tuple[float, ...]) -> None:
    outer = OuterOptimizer(lr=0.25, momentum=0.5, nesterov=nesterov)
    momentum, D1, D2 = tensor(0, 0), tensor(8, 0), tensor(0, 4)
    assert torch.equal(outer_update(D1, momentum, outer), tensor(*first))
    assert torch.equal(momentum, D1)
    assert torch.equal(outer_update(D2, momentum, outer), tensor(*second))
    assert torch.equal(momentum, tensor(4, 4))
    assert torch.equal(D1, tensor(8, 0)) and torch.equal(D2, tensor(0, 4))


def test_the_buffer_is_kept_in_its_own_precision() -> None:
    momentum = torch.zeros(2, dtype=torch.float32)
    update = outer_update(tensor(8, 4), momentum, OuterOptimizer(lr=0.25, momentum=0.5))
    assert update.dtype == torch.float64 and torch.equal(update, tensor(3, 1.5))
    assert momentum.dtype == torch.float32 and torch.equal(momentum, torch.tensor([8.0, 4.0]))


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_orthogonalized_keeps_the_norm_and_the_spaces_and_brings_singular_values_to_one_size() -> None:
    left, right = torch.linalg.qr(matrix(6, 6)).Q, torch.linalg.qr(matrix(9, 6, seed=1)).Q
    D = left @ torch.diag(tensor(9, 5, 2, 1, 0.3, 0.1)) @ right.mT
    result = orthogonalized(D)
    torch.testing.assert_close(result.norm(), D.norm())
    found = left.mT @ result @ right
    values = found.diagonal()
    torch.testing.assert_close(found, torch.diag(values))  # the same left and right directions, none turned round
    assert 0 < float(values.max() / values.min()) < 2  # it was 90


def test_a_matrix_cut_along_its_columns_is_orthogonalized_as_the_whole() -> None:
    D = matrix(6, 9)
    parts = [part.contiguous() for part in D.split(3, dim=1)]
    # The sums that three holders would make, one after the other: each is asked for in the order of the iterations.
    sums: list[Tensor] = []
    whole = orthogonalized(D, lambda part: sums.append(part.clone()) or part)
    for index, part in enumerate(parts):
        given = iter(sums)
        torch.testing.assert_close(orthogonalized(part, lambda _: next(given)), whole[:, 3 * index : 3 * index + 3])  # noqa: B023


@pytest.mark.parametrize("rank", [0, 1])
def test_orthogonalized_leaves_zeros_zero_and_a_single_direction_as_it_is(rank: int) -> None:
    D = matrix(6, rank) @ matrix(rank, 9)
    torch.testing.assert_close(orthogonalized(D), D)
