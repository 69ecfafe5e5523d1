"""Fragments of a flat tensor, cut anywhere, follow `reference.py` on every replicas x shards layout.

No engine: the flat tensor is cut here as ZeRO cuts its own, so that odd cuts can be tried cheaply.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lordo_ds import LoRDO, LordoConfig
from lordo_ds.core.fragments import FlatTensor, Piece
from lordo_ds.core.grouping import plan_parameters
from lordo_ds.core.mesh import replica_layout
from lordo_ds.core.reference import Reference
from lordo_ds.dist.groups import replica_groups
from lordo_ds.dist.shards import ShardComm
from lordo_ds.dist.wire import ReplicaWire
from tests import problems
from tests.ranks import run_ranks

STEPS = 10
BASE = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "rank": 3, "sync_interval": 3}
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "factored": {"preset": "recommended"},
    "factored_error_feedback": {"qh_mode": "factored", "error_feedback": "fp32"},
    "low_rank_error_feedback": {"qh_mode": "low_rank", "error_feedback": "fp32"},
    "none_error_feedback": {"qh_mode": "none", "error_feedback": "fp32"},
    "eigh": {"basis_update": "eigh"},
    "svd_rank_above_the_smaller_side": {"basis_update": "svd", "rank": 64},
    "complement": {"basis_source": "complement", "error_feedback": "fp32", "rank": 2},
    "gradient": {"basis_source": "gradient", "error_feedback": "fp32", "qh_mode": "none"},
    "gradient_every_step": {
        "basis_source": "gradient",
        "sync_interval": 1,
        "qh_mode": "none",
        "error_feedback": "fp32",
    },
    "local": {"projection": "local"},
}
CUTS = ("equal", "padded", "one_shard_almost_everything", "inside_one_row")


def cuts(kind: str, total: int, shards: int) -> list[int]:
    """Shard boundaries in the flat order, `shards + 1` of them."""
    width = -(-total // shards)
    if kind == "equal":
        return [min(i * width, total) for i in range(shards + 1)]
    if kind == "padded":  # the last shard holds little and padding
        return [min(i * (width + 7), total) for i in range(shards)] + [total]
    if kind == "one_shard_almost_everything":
        return [0, *range(total - shards + 1, total), total]
    return [0, *range(3, 3 + shards - 1), total]  # several cuts inside the first row


def flat_problem(
    kind: str, shards: int, shard: int, dtype: torch.dtype
) -> tuple[FlatTensor, torch.nn.Parameter, slice]:
    weights = problems.initial_weights(dtype)
    whole = torch.cat([weights[name].flatten() for name in problems.SHAPES])
    edges = cuts(kind, whole.numel(), shards)
    held = slice(edges[shard], edges[shard + 1])
    flat = torch.nn.Parameter(torch.cat([whole[held], torch.zeros(5, dtype=dtype)]))  # padding at the end
    pieces, at = [], 0
    for fact in problems.facts():
        numel = torch.Size(fact.shape).numel()
        spans = []
        for start, stop in itertools.pairwise(edges):
            a, b = max(start, at) - at, min(stop, at + numel) - at
            spans.append((a, b) if b > a else (0, 0))
        pieces.append(Piece(fact, tuple(spans), offset=max(0, at - held.start)))
        at += numel
    return FlatTensor(flat, tuple(pieces)), flat, held


def difference(case: dict[str, Any], kind: str, replica_size: int, dtype: torch.dtype) -> tuple[float, int]:
    settings = {**BASE, **case}
    groups = replica_groups(replica_layout(range(dist.get_world_size()), replica_size, dist.get_world_size()))
    replicas, replica, shard = groups.layout.replica_count, groups.replica_index, groups.shard_index
    problem, flat, held = flat_problem(kind, replica_size, shard, dtype)
    optimizer = LoRDO([flat], **settings)
    optimizer.managed = True
    comm = ShardComm(groups.shard if replica_size > 1 else None)
    optimizer.attach([problem], ReplicaWire(groups.replica if replicas > 1 else None), comm)
    config = LordoConfig.parse(settings)
    start = [problems.initial_weights(dtype) for _ in range(replicas)]
    reference = Reference(config, plan_parameters(config, problems.facts()), start)
    worst = 0.0
    for step in range(1, STEPS + 1):
        each = [problems.gradients(step, m, dtype) for m in range(replicas)]
        mine = torch.cat([each[replica][name].flatten() for name in problems.SHAPES])
        flat.grad = torch.zeros_like(flat)
        flat.grad[: held.stop - held.start] = mine[held]
        optimizer.step()
        flat.grad.fill_(float("nan"))  # engines reuse their flat gradient buffers
        optimizer.end_attempt()
        reference.step(each)  # type: ignore[arg-type]
        expected = torch.cat([reference.weights[replica][name].flatten() for name in problems.SHAPES])[held]
        found = flat.detach()[: held.stop - held.start]
        # Relative to the largest weight of all: a fragment may hold nothing but small ones.
        scale = max(float(weight.abs().max()) for weight in reference.weights[replica].values())
        worst = max(worst, float((found - expected).abs().max()) / scale if found.numel() else 0.0)
    return worst, check_duplicates(optimizer, comm)


def check_duplicates(optimizer: LoRDO, comm: ShardComm) -> int:
    """Whatever several shards keep is bitwise equal on them: bases, border rows' moments, row means.

    Returns how many such tensors there are.
    """
    assert optimizer.sync is not None
    if comm.size == 1:
        return 0
    mine: dict[str, Any] = {}
    for item in optimizer.sync.items:
        if item.shards is None:
            continue
        name, on_rows = item.plan.name, item.shards.basis_on_rows
        first = item.shards.rows(comm.index)[0]
        for _, row in item.shards.borders(comm.index):
            keys = ("basis", "row_mean_sq") if on_rows else ("exp_avg", "exp_avg_sq", "col_mean_sq")
            for key in keys:
                if key in item.state:
                    column = (
                        item.state[key][row - first]
                        if on_rows or key == "col_mean_sq"
                        else item.state[key][:, row - first]
                    )
                    mine[f"{name} {key} row {row}"] = column.clone()
        if not on_rows and item.numel:
            mine[f"{name} basis"] = item.basis.clone()
            if "row_mean_sq" in item.state:
                mine[f"{name} row_mean_sq"] = item.state["row_mean_sq"].clone()
    everybody: list[Any] = [None] * comm.size
    dist.all_gather_object(everybody, mine, group=comm.group)
    shared = 0
    for key in {key for each in everybody for key in each}:
        copies = [each[key] for each in everybody if key in each]
        shared += len(copies) > 1
        assert all(torch.equal(copy, copies[0]) for copy in copies), f"{key} differs between shards"
    return shared


def all_differences(replica_size: int) -> dict[str, tuple[float, int]]:
    torch.set_num_threads(1)
    found = {}
    for name, case in CASES.items():
        for kind in CUTS if name in ("paper", "factored_error_feedback") else CUTS[:1]:
            for dtype in (torch.float64, torch.float32):
                found[f"{name} {kind} {dtype}"] = difference(case, kind, replica_size, dtype)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("replicas", "shards"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)])
def test_fragments_follow_the_reference_on_every_layout(replicas: int, shards: int) -> None:
    for differences in run_ranks(all_differences, replicas * shards, shards, timeout_s=240):
        assert shards == 1 or sum(kept_twice for _, kept_twice in differences.values()) > 20
        for case, (value, _) in differences.items():
            assert value < (1e-6 if "float64" in case else 1e-5), f"{case}: {value:.1e}"
