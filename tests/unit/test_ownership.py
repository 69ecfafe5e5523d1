"""Every element of a bucket has one owner."""

from __future__ import annotations

import pytest

from lordo_ds.core.ownership import Segment, numel_of, shared_out


@pytest.mark.parametrize("owners", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("block", [1, 64, 256])
@pytest.mark.parametrize("numels", [[], [0], [1], [10, 0, 3], [1000, 1, 77, 4096, 5], [63, 65, 64, 128], [7] * 40])
def test_every_element_has_one_owner(numels: list[int], block: int, owners: int) -> None:
    found = shared_out(numels, owners, block)
    assert len(found) == owners
    held = {item: [False] * numel for item, numel in enumerate(numels)}
    for segments in found:
        assert len({segment.item for segment in segments}) == len(segments), "an owner has two parts of a parameter"
        for segment in segments:
            assert segment.numel > 0
            for element in range(segment.start, segment.stop):
                assert not held[segment.item][element], f"{segment} belongs to two owners"
                held[segment.item][element] = True
    assert all(all(elements) for elements in held.values())


@pytest.mark.parametrize("block", [1, 64, 256])
def test_owners_have_whole_blocks_and_about_the_same(block: int) -> None:
    found = shared_out([5000, 300, 41, 9000], 4, block)
    lengths = [numel_of(segments) for segments in found]
    assert all(length % block == 0 for length in lengths[:-1])
    assert max(lengths) - min(lengths) < 4 * block


def test_a_parameter_may_have_several_owners() -> None:
    assert shared_out([6, 4], 2, 1) == [[Segment(0, 0, 5)], [Segment(0, 5, 6), Segment(1, 0, 4)]]
