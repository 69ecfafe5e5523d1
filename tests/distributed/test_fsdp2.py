"""`fully_shard` without an engine: every replicas x shards x tensor layout follows `reference.py`.

The shards are uneven, or empty, where rows do not divide; the bases lie on either side; what crosses replicas between
syncs is nothing, and at a sync what was predicted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import lordo_ds
from lordo_ds import LoRDO
from lordo_ds.core.grouping import ParameterFacts
from lordo_ds.core.schedule import sync_plan
from tests import problems, sharded
from tests.cases import Found, once, run_cases
from tests.collectives import CollectiveCounter
from tests.ranks import run_ranks
from tests.references import Trajectory, trajectory

pytestmark = pytest.mark.distributed

STEPS = 10  # three syncs, and a step on what the last one left
BASE: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "rank": 3, "sync_interval": 3}
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "spectral": {
        "qh_mode": "factored",
        "residual_weight": 0.25,
        "outer": {"momentum": 0.7, "orthogonalize": True, "residual_gain": 2.0},
    },
    "error_feedback": {"error_feedback": "fp32", "qh_mode": "factored", "outer": {"lr": 0.7, "momentum": 0.7}},
}
LAYOUTS = [(1, 2, 1), (2, 1, 1), (2, 2, 1), (1, 3, 1), (1, 2, 2), (2, 1, 2)]  # replicas, shards, tensor


def facts(tensor: int) -> list[ParameterFacts]:
    """Of the whole model; a slice's side never carries the basis."""
    dims = sharded.SLICED if tensor > 1 else {}
    return [replace(fact, partition_dim=dims.get(fact.name)) for fact in problems.facts()]


def follow(expected: Trajectory, shards: int, tensor: int, case: str, dtype: torch.dtype) -> dict[str, Any]:
    """Largest distance to the reference after every step, and what crossed replicas."""
    settings = {**BASE, **CASES[case]}
    model, mesh = sharded.replicas_of(shards, tensor, dtype)
    replica, shard, index = sharded.place_of(mesh)
    optimizer = LoRDO(model, mesh=mesh, **settings)
    worst, between, wrong = 0.0, [], []
    replica_of = sharded.replica_of_each_rank(shards, tensor)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        sent = 0 if optimizer.sync is None else optimizer.sync.wire.ledger.total_bytes
        with CollectiveCounter() as counter:
            model(sharded.given(step, replica, shard, shards, (index, tensor), dtype)).backward()
            optimizer.step()
        assert optimizer.sync is not None
        sent = optimizer.sync.wire.ledger.total_bytes - sent
        plan = sync_plan(optimizer.config, step)
        if plan.due:
            predicted = optimizer.sync.predicted_bytes(plan, 0, 0)
            wrong += [(step, sent, predicted)] * (sent != predicted)
        elif step > 1:  # the first one starts everybody, and makes the first bases
            between += [*counter.crossing(replica_of), *[sent] * (sent > 0)]
        for name, parameter in model.named_parameters():
            exact = expected[name.removesuffix(".weight")][step - 1, replica]
            worst = max(worst, float((sharded.whole(parameter) - exact).abs().max() / exact.abs().max()))
    return {"worst": worst, "between": between, "wrong": wrong, "status": lordo_ds.status(optimizer)}


@once
def all_cases(replicas: int, shards: int, tensor: int) -> Found[str]:
    cases = {}
    for case in CASES:
        # Small singular values come up with their rounding; where elements go is the same in fp64.
        dtype = torch.float64 if case == "spectral" else torch.float32
        expected = trajectory({**BASE, **CASES[case]}, facts(tensor), replicas, dtype, STEPS, shards)
        cases[case] = (expected, shards, tensor, case, dtype)
    return run_cases(follow, replicas * shards * tensor, cases, timeout_s=180)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("replicas", "shards", "tensor"), LAYOUTS)
def test_every_layout_follows_the_reference(replicas: int, shards: int, tensor: int, case: str) -> None:
    for rank, found in enumerate(all_cases(replicas, shards, tensor)[case]):
        assert found["worst"] < (1e-6 if case == "spectral" else 1e-5), f"rank {rank}: {found['worst']:.1e}"


@pytest.mark.parametrize(("replicas", "shards", "tensor"), LAYOUTS)
def test_nothing_crosses_replicas_between_syncs_and_at_one_what_was_predicted(
    replicas: int, shards: int, tensor: int
) -> None:
    for case in CASES:
        for found in all_cases(replicas, shards, tensor)[case]:
            assert not found["between"] and not found["wrong"]
            status = found["status"]
            assert (status["replicas"], status["shard_size"], status["tensor_parallel_size"]) == (
                replicas, shards, tensor,
            )  # fmt: skip
            assert (status["low_rank_parameters"], status["dense_parameters"], status["syncs"]) == (5, 1, 3)
            assert (status["bytes_sent_total"] > 0) == (replicas > 1)


def test_moments_are_divided_by_the_shards() -> None:
    """But for the padding of uneven shards, and the bases of matrices cut along the other side."""
    whole, halved = (
        [found["status"]["state_bytes"] for found in all_cases(2, shards, 1)["paper"]] for shards in (1, 2)
    )
    for kind in ("exp_avg", "exp_avg_sq", "anchor", "dense_exp_avg"):
        assert sum(state[kind] for state in halved[:2]) == whole[0][kind]
        assert max(state[kind] for state in halved) < 0.6 * whole[0][kind]


# -- clipping ------------------------------------------------------------------------------------------


def clipped(shards: int, tensor: int, max_norm: float) -> tuple[float, float, dict[str, torch.Tensor]]:
    """The norm before and after, and the gradients after it."""
    model, mesh = sharded.replicas_of(shards, tensor, torch.float64)
    replica, shard, index = sharded.place_of(mesh)
    model(sharded.given(1, replica, shard, shards, (index, tensor), torch.float64)).backward()
    before = lordo_ds.clip_grad_norm_(model.parameters(), max_norm)
    after = lordo_ds.clip_grad_norm_(model.parameters(), 1e9)
    return float(before), float(after), {name: sharded.whole(p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("shards", "tensor"), [(2, 1), (1, 2), (2, 2)])
def test_gradients_are_clipped_by_the_norm_of_the_whole_replica(shards: int, tensor: int) -> None:
    replicas = 4 // (shards * tensor)
    found = run_ranks(clipped, 4, shards, tensor, 2.0, timeout_s=60)
    for rank, (before, after, gradients) in enumerate(found):
        first = rank // (shards * tensor) * shards
        each = [problems.gradients(1, at, torch.float64) for at in range(first, first + shards)]
        mean = {name: torch.stack([one[name] for one in each]).mean(0) for name in problems.SHAPES}
        norm = float(torch.cat([gradient.flatten() for gradient in mean.values()]).norm())
        assert before == pytest.approx(norm) and after == pytest.approx(2.0) and norm > 4.0
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, mean[name.removesuffix(".weight")] * (2.0 / norm), rtol=1e-5, atol=1e-9
            )
    assert len({round(before, 9) for before, *_ in found}) == replicas, "each replica by its own norm"
