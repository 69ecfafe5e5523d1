"""The numbers that replicas tell each other: their order on the wire, and that they come back as they were."""

from __future__ import annotations

import struct

import pytest
import torch

from lordo_ds.sync.header import FirstBasisFlags, Header, RankCondition, Told, Trailer
from lordo_ds.sync.outliers import SIZES


def bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


SIZES_TOLD = (0.5, float("inf"), -1.25, 1e-310, 3.0, 4.0, 5.0, 6.0)
HEADER = Header(
    step=20, rows=3, row_length=2, finite=True, executed_steps=19, executed_now=False,
    basis_checksum=-(1 << 62) - 1, groups=7, loaded=8, load_fault=2, sizes=SIZES_TOLD,
)  # fmt: skip
WIRE = {
    "header": (HEADER, [20, 3, 2, 1, 19, 0, -(1 << 62) - 1, 7, 8, 2, *map(bits, SIZES_TOLD)]),
    "trailer": (Trailer(-5, 0.1, 0.2, 0.3, 4.0, 0.5, 0.6), [-5, *map(bits, (0.1, 0.2, 0.3, 4.0, 0.5, 0.6))]),
    "first basis": (FirstBasisFlags(1, True, 0, True), [1, 1, 0, 1]),
    "one rank": (RankCondition(False, 9, SIZES_TOLD), [0, 9, *map(bits, SIZES_TOLD)]),
}


@pytest.mark.parametrize(("told", "numbers"), WIRE.values(), ids=WIRE)
def test_a_message_is_these_numbers_in_this_order_and_is_read_back_by_name(told: Told, numbers: list[int]) -> None:
    assert told.pack() == numbers and len(numbers) == type(told).width()
    rows = torch.tensor([[*numbers, 1, 2], [*numbers, 3, 4]])  # what comes with it is not read
    assert type(told).unpack(rows) == [told, told]


def test_a_size_that_is_not_a_number_arrives_as_one() -> None:
    mine = RankCondition(True, 0, (float("nan"),) * len(SIZES))
    (found,) = RankCondition.unpack(torch.tensor([mine.pack()]))
    assert all(size != size for size in found.sizes)


def test_a_tuple_of_another_length_is_not_sent() -> None:
    with pytest.raises(AssertionError, match="sizes"):
        RankCondition(True, 0, (1.0,)).pack()
