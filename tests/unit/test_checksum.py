"""The checksum that proves replicas equal notices every way in which two bases are known to differ."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lordo_ds.comm import checksum as checksum_module
from lordo_ds.comm.checksum import checksum

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_tensors_agree_whatever_their_strides(dtype: torch.dtype) -> None:
    matrix = random(7, 5, dtype=dtype)
    assert checksum([matrix]) == checksum([matrix.clone()]) == checksum([matrix.mT.contiguous().mT])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [2, 3, 8, 16])
def test_a_flipped_column_is_noticed(rows: int, dtype: torch.dtype) -> None:
    """A decomposition may flip a column's sign on one replica: the likeliest difference of all."""
    for seed in range(200):
        basis = random(rows, 3, seed=seed, dtype=dtype)
        flipped = basis.clone()
        flipped[:, seed % 3] *= -1
        assert checksum([basis]) != checksum([flipped]), f"seed {seed}"


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_pattern_of_flipped_signs_is_noticed(dtype: torch.dtype) -> None:
    """Signs + - - + cancel in any sum whose weights are linear in the position."""
    sums = {checksum([torch.tensor(signs, dtype=dtype)]) for signs in itertools.product((1.0, -1.0), repeat=8)}
    assert len(sums) == 2**8


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("distance", [1, 2, 1 << 6, 1 << 10, 1 << 12, 1 << 16])
def test_two_swapped_values_are_noticed_at_any_distance(distance: int, dtype: torch.dtype) -> None:
    one = torch.zeros(distance + 3, dtype=dtype)
    one[0], one[distance] = 1, 2
    other = one.clone()
    other[0], other[distance] = 2, 1
    assert checksum([one]) != checksum([other])


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_last_bit_of_any_value_is_noticed(dtype: torch.dtype) -> None:
    vector = random(33, dtype=dtype)
    seen = {checksum([vector])}
    for index in range(33):
        changed = vector.clone()
        changed[index] = torch.nextafter(changed[index].float(), torch.tensor(9e9)).to(dtype)
        if dtype in (torch.bfloat16, torch.float16):
            changed.view(torch.int16)[index] += 1
        seen.add(checksum([changed]))
    assert len(seen) == 34


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_complement_of_a_bit_pattern_is_noticed(dtype: torch.dtype) -> None:
    """x ^ (x >> k) is the same for x and ~x where the shift repeats the sign."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    one = torch.ones(1, dtype=dtype)
    other = (~one.view(integers[one.element_size()])).view(dtype)
    assert checksum([one]) != checksum([other])


def test_the_order_of_tensors_and_the_cut_between_them_are_noticed() -> None:
    one, two = random(6, seed=1), random(6, seed=2)
    sums = {
        checksum([one, two]),
        checksum([two, one]),
        checksum([one]),
        checksum([two]),
        checksum([one, one]),
    }
    assert len(sums) == 5


def test_permuted_columns_and_rows_are_noticed() -> None:
    basis = random(4, 4)
    orders = list(itertools.permutations(range(4)))
    assert len({checksum([basis[:, list(order)]]) for order in orders}) == len(orders)
    assert len({checksum([basis[list(order)]]) for order in orders}) == len(orders)


def test_bit_patterns_count_so_nan_equals_itself_and_minus_zero_differs() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert checksum([nan]) == checksum([nan.clone()])
    assert checksum([torch.tensor([0.0])]) != checksum([torch.tensor([-0.0])])


def test_it_fits_a_signed_64_bit_integer_and_nothing_at_all_is_legal() -> None:
    for seed in range(50):
        assert -(2**63) <= checksum([random(100, seed=seed), random(3, seed=seed)]) < 2**63
    assert isinstance(checksum([]), int)
    assert isinstance(checksum([torch.zeros(0), torch.tensor(3.0), torch.ones(3, dtype=torch.bool)]), int)


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40), chunk=st.integers(1, 16))
def test_the_size_of_a_chunk_does_not_show(values: list[int], chunk: int) -> None:
    tensor = torch.tensor(values, dtype=torch.int32)
    whole, saved = checksum([tensor]), checksum_module._CHUNK
    try:
        checksum_module._CHUNK = chunk
        assert checksum([tensor]) == whole
    finally:
        checksum_module._CHUNK = saved
