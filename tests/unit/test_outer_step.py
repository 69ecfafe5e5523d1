"""Who works on which matrix at a sync, in what order, and the residual's gain. Plain numbers, no processes."""

from __future__ import annotations

import pytest
import torch

from lordo_ds.comm.inside import InsideComm, InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import balanced_order, bucket_bounds, whole
from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.replica.fragment import Fragment
from lordo_ds.sync.outer_step import matrix_owners, with_residual_gain
from lordo_ds.sync.outer_sync import OuterSync

ON_FIRST, ON_SECOND, ON_BOTH = [(0, 8), (0, 0)], [(0, 0), (0, 8)], [(0, 4), (4, 8)]


def test_a_matrix_on_one_shard_is_worked_on_there() -> None:
    assert matrix_owners([5, 5, 5], [ON_SECOND, ON_FIRST, ON_SECOND]) == [1, 0, 1]


def test_matrices_on_all_shards_are_divided_by_their_cost() -> None:
    assert matrix_owners([1, 4, 2, 1], [ON_BOTH] * 4) == [1, 0, 1, 1]
    assert matrix_owners([3] * 4, [ON_BOTH] * 4) == [0, 1, 0, 1]


def test_a_shard_that_holds_little_of_a_matrix_works_on_it_only_where_the_others_have_their_share() -> None:
    mostly_first, mostly_second = [(0, 6), (6, 8)], [(0, 2), (2, 8)]
    assert matrix_owners([4, 4, 4, 4], [mostly_second, mostly_second, mostly_first, mostly_first]) == [1, 1, 0, 0]
    assert matrix_owners([4, 4, 4, 4], [mostly_second] * 4) == [1, 1, 0, 0]
    assert matrix_owners([4, 4, 4], [ON_SECOND] * 3) == [1, 1, 0]


def test_no_matrices_have_no_owners() -> None:
    assert matrix_owners([], []) == []


def test_every_stretch_of_the_order_has_work_for_every_shard() -> None:
    assert balanced_order([ON_FIRST, ON_FIRST, ON_SECOND, ON_SECOND]) == [0, 2, 1, 3]
    assert balanced_order([ON_FIRST, ON_FIRST, [(0, 0), (0, 16)]]) == [0, 1, 2]
    held = [ON_FIRST] * 6 + [ON_SECOND] * 6
    for start, stop in bucket_bounds([8] * 12, 32):
        stretch = [held[i] for i in balanced_order(held)[start:stop]]
        assert stretch.count(ON_FIRST) == stretch.count(ON_SECOND)


def test_the_order_stays_where_all_shards_hold_alike() -> None:
    assert balanced_order([ON_BOTH, [(0, 6), (6, 12)], ON_BOTH]) == [0, 1, 2]
    assert balanced_order([[(0, 8)], [(0, 3)]]) == [0, 1]


@pytest.mark.parametrize(("shape", "side"), [((6, 9), "rows"), ((9, 6), "columns")])
def test_the_residual_gain_enlarges_what_lies_outside_the_basis_and_nothing_else(
    shape: tuple[int, int], side: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(shape, generator=generator, dtype=torch.float64)
    plan = ParameterPlan("w", shape, True, "", side=side, rank=2)  # type: ignore[arg-type]
    fragment = Fragment(plan, torch.zeros(shape, dtype=torch.float64), 0, whole(shape), InsideReplica(), {}, {})
    fragment.allocate(LordoConfig.parse({}))
    Q = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64)).Q
    fragment.store_basis(Q)
    given = D.clone()
    gained = plan.orient(with_residual_gain(fragment, D.flatten(), 2.5).view(shape))
    assert torch.equal(D, given)
    inside = Q @ (Q.mT @ plan.orient(D))
    torch.testing.assert_close(gained, inside + 2.5 * (plan.orient(D) - inside))
    torch.testing.assert_close(Q.mT @ gained, Q.mT @ plan.orient(D))


@pytest.mark.parametrize(("orthogonalize", "matrices"), [(False, 1), (True, 2)])
def test_a_bucket_has_a_matrix_for_every_shard(orthogonalize: bool, matrices: int) -> None:
    """However large the matrices are; messages alone may be smaller."""
    shard = InsideComm()
    shard.size = 2
    config = LordoConfig.parse({"outer": {"momentum": 0.5, "orthogonalize": orthogonalize}})
    items = []
    for number in range(4):
        plan = ParameterPlan(f"w{number}", (8, 8), True, "", side="rows", rank=2)
        halves = ((0, 32), (32, 64))
        items.append(Fragment(plan, torch.zeros(32), 0, halves, InsideReplica(shard=shard), {}, {}))
    sync = OuterSync(config, items, ReplicaWire(), InsideReplica(shard=shard), bucket_numel=10)
    assert [len(bucket) for bucket in sync.buckets] == [matrices] * (4 // matrices)
