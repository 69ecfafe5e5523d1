"""Every element of a bucket has one owner."""

from __future__ import annotations

import random

import pytest

from lordo_ds.config import LordoConfig
from lordo_ds.core.ownership import Segment, at_owners, by_matrix, numel_of, shared_out


@pytest.mark.parametrize("owners", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("block", [1, 64, 256])
@pytest.mark.parametrize("numels", [[], [0], [1], [10, 0, 3], [1000, 1, 77, 4096, 5], [63, 65, 64, 128], [7] * 40])
def test_every_element_has_one_owner(numels: list[int], block: int, owners: int) -> None:
    found = shared_out(numels, owners, block)
    assert all(segment.numel > 0 for segments in found for segment in segments)
    require_one_owner_each(found, numels, owners)


def require_one_owner_each(found: list[list[Segment]], numels: list[int], owners: int) -> None:
    assert len(found) == owners
    held = {item: [False] * numel for item, numel in enumerate(numels)}
    for segments in found:
        assert len({segment.item for segment in segments}) == len(segments), "an owner has two parts of a parameter"
        for segment in segments:
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


@pytest.mark.parametrize("owners", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(20))
def test_a_matrix_has_one_owner_on_all_shards_and_every_element_one_on_each(owners: int, seed: int) -> None:
    draw = random.Random(seed)
    shards, parameters = draw.choice([1, 2, 3]), draw.randrange(1, 12)
    held = [[draw.choice([0, 1, 5, 30, 200]) for _ in range(shards)] for _ in range(parameters)]
    whole = [draw.random() < 0.6 for _ in held]
    owner_of: dict[int, set[int]] = {}
    for shard in range(shards):
        found = by_matrix(held, whole, owners, shard)
        require_one_owner_each(found, [lengths[shard] for lengths in held], owners)
        for owner, segments in enumerate(found):
            assert [one.item for one in segments] == sorted(one.item for one in segments)
            for one in segments:
                if whole[one.item]:
                    assert one == Segment(one.item, 0, held[one.item][shard])
                    owner_of.setdefault(one.item, set()).add(owner)
    assert owner_of == {i: owner_of[i] for i, kept_whole in enumerate(whole) if kept_whole}
    assert all(len(of_one) == 1 for of_one in owner_of.values())


def test_the_other_parameters_fill_up_equal_shares() -> None:
    found = by_matrix([[60], [50], [200], [90]], [True, True, False, False], 4)
    assert [numel_of(segments) for segments in found] == [100, 100, 100, 100]
    assert [one.item for one in found[0]] == [0, 2] and [one.item for one in found[3]] == [2, 3]


@pytest.mark.parametrize(
    ("settings", "replicas", "expected"),
    [
        ({}, 8, False),
        ({"preset": "recommended"}, 4, True),
        ({"preset": "recommended"}, 2, False),
        ({"preset": "recommended", "pseudo_gradient_dtype": "bf16"}, 4, True),
        ({"preset": "recommended", "pseudo_gradient_dtype": "int8"}, 4, False),
        ({"preset": "recommended", "projection": "local"}, 4, False),
        ({"preset": "recommended", "outer": {"compute": "everyone"}}, 4, False),
        ({"outer": {"compute": "owner"}}, 2, True),
        ({"outer": {"compute": "owner"}}, 1, False),
    ],
)
def test_where_the_work_is_done(settings: dict[str, object], replicas: int, expected: bool) -> None:
    assert at_owners(LordoConfig.parse(settings), replicas) is expected
