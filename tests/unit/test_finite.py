"""What is not finite in a saved run, and whether a sync can mend it."""

from __future__ import annotations

import pytest
import torch

from lordo_ds.checkpoint.finite import NotFinite, is_finite, not_finite, replicas_to_reseed
from lordo_ds.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_element_tells(dtype: torch.dtype, value: float) -> None:
    tensor = torch.ones(3, 5, dtype=dtype)
    assert is_finite(tensor) and is_finite(tensor[:0])
    tensor[1, 2] = value
    assert not is_finite(tensor)
    assert not_finite(2, "w", {"a": tensor, "b": torch.ones(1), "step": 3}) == [NotFinite(2, "w", "a")]


def test_largest_numbers_are_finite() -> None:
    assert is_finite(torch.full((1000,), torch.finfo(torch.float32).max))
    assert is_finite(torch.arange(3))


def test_a_replicas_own_is_mended_by_the_others_what_all_agreed_on_is_not() -> None:
    own, all_have = NotFinite(1, "w", "exp_avg"), NotFinite(0, "w", "weight")
    assert replicas_to_reseed([], 2, "x") == []
    assert replicas_to_reseed([own], 2, "x") == [1]
    for found, replicas, message in (
        ([own, all_have], 2, "x: 'weight' of w is not finite in replica 0, and no other replica's state is"),
        ([NotFinite(0, "w", "exp_avg")], 1, "'exp_avg' of w is not finite in replica 0: choose another tag"),
        ([own, NotFinite(1, "w", "anchor")], 3, "'anchor' of w is not finite in replica 1: choose another tag"),
    ):
        with pytest.raises(CheckpointError, match=message):
            replicas_to_reseed(found, replicas, "x")
