"""Fragments of a flat tensor, cut anywhere, follow `reference.py` on every replicas x shards x tensor layout.

No engine: matrices are sliced here as Megatron's layers do, and the flat tensor of the slices is cut as ZeRO cuts its
own, so that odd cuts can be tried cheaply.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lordo_ds import LoRDO, LordoConfig
from lordo_ds.comm.groups import ReplicaGroups, replica_groups
from lordo_ds.comm.inside import InsideComm, InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.core.fragments import FlatTensor, Piece
from lordo_ds.core.grouping import ParameterFacts
from lordo_ds.core.mesh import replica_layout
from lordo_ds.core.outer import orthogonalized
from lordo_ds.sync import outer_step
from tests import problems
from tests.cases import Found, once, run_cases
from tests.ranks import run_ranks
from tests.references import Trajectory, fp32_limit, trajectory

STEPS = 7  # two syncs, and a step on what the second one left
BASE = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "rank": 3, "sync_interval": 3}
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "factored": {"preset": "recommended"},
    "factored_error_feedback": {"qh_mode": "factored", "error_feedback": "fp32"},
    "low_rank_error_feedback": {"qh_mode": "low_rank", "error_feedback": "fp32"},
    "none_error_feedback": {"qh_mode": "none", "error_feedback": "fp32"},
    "spectral": {
        "qh_mode": "factored",
        "residual_weight": 0.25,
        "outer": {"momentum": 0.7, "orthogonalize": True, "residual_gain": 2.0},
    },
    "owners": {
        "qh_mode": "factored",
        "moment_sync_interval": [3, 6],
        "outer": {"momentum": 0.7, "orthogonalize": True, "residual_gain": 2.0, "compute": "owner"},
    },
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


# The dimension that tensor parallelism slices; "small" and "bias" are kept whole by every tensor index.
SLICED = {"tall": 0, "long": 0, "wide": 1, "square": 1}
SLICED_ON_THE_SMALLER_SIDE = {"tall": 1, "long": 0, "wide": 1, "square": 0}
SLICES = {"usual": SLICED, "on the smaller side": SLICED_ON_THE_SMALLER_SIDE}


def facts(sliced: dict[str, int], partitions: int) -> list[ParameterFacts]:
    """Of the slices on one tensor index."""
    found = []
    for fact in problems.facts():
        dim, shape = sliced.get(fact.name), list(fact.shape)
        if dim is not None:
            shape[dim] //= partitions
        found.append(replace(fact, shape=tuple(shape), partition_dim=dim, partitions=1 if dim is None else partitions))
    return found


def flatten(values: dict[str, Tensor], sliced: dict[str, int], index: int, partitions: int) -> Tensor:
    """One tensor index's slices, end to end."""
    parts = []
    for name in problems.SHAPES:
        value = values[name]
        if name in sliced:
            value = value.chunk(partitions, dim=sliced[name])[index]
        parts.append(value.flatten())
    return torch.cat(parts)


def flat_problem(
    kind: str, shards: int, shard: int, slices: list[ParameterFacts], whole: Tensor
) -> tuple[FlatTensor, torch.nn.Parameter, slice]:
    edges = cuts(kind, whole.numel(), shards)
    held = slice(edges[shard], edges[shard + 1])
    flat = torch.nn.Parameter(torch.cat([whole[held], torch.zeros(5, dtype=whole.dtype)]))  # padding at the end
    pieces, at = [], 0
    for fact in slices:
        numel = torch.Size(fact.shape).numel()
        spans = []
        for start, stop in itertools.pairwise(edges):
            a, b = max(start, at) - at, min(stop, at + numel) - at
            spans.append((a, b) if b > a else (0, 0))
        pieces.append(Piece(fact, tuple(spans), offset=max(0, at - held.start)))
        at += numel
    return FlatTensor(flat, tuple(pieces)), flat, held


def groups_of(replica_size: int, tensor: int) -> ReplicaGroups:
    """The mesh replica x shard x tensor, tensor fastest."""
    me, world = dist.get_rank(), dist.get_world_size()
    first = me // tensor * tensor
    layout = replica_layout(range(me % tensor, world, tensor), replica_size, world // tensor)
    return replica_groups(layout, range(first, first + tensor))


def difference(
    expected: Trajectory,
    settings: dict[str, Any],
    kind: str,
    replica_size: int,
    tensor: int,
    sliced: dict[str, int],
    dtype: torch.dtype,
    given: Callable[[int, int, torch.dtype], dict[str, Tensor]] = problems.gradients,
) -> tuple[float, int]:
    """Largest distance of this rank's fragment to the reference, and how much of the state several shards keep."""
    groups = groups_of(replica_size, tensor)
    replicas, replica, shard = groups.layout.replica_count, groups.replica_index, groups.shard_index
    index = dist.get_rank(groups.tensor)
    whole = flatten(problems.initial_weights(dtype), sliced, index, tensor)
    problem, flat, held = flat_problem(kind, replica_size, shard, facts(sliced, tensor), whole)
    optimizer = LoRDO([flat], **settings)
    optimizer.managed = True
    inside = InsideReplica(
        shard=InsideComm(groups.shard if replica_size > 1 else None),
        tensor=InsideComm(groups.tensor if tensor > 1 else None),
        everyone=InsideComm(groups.inside if replica_size * tensor > 1 else None),
    )
    optimizer.attach([problem], ReplicaWire(groups.replica if replicas > 1 else None), inside)
    assert optimizer.sync is not None
    config, worst = LordoConfig.parse(settings), 0.0
    for step in range(1, STEPS + 1):
        flat.grad = torch.zeros_like(flat)
        gradients = given(step, replica, dtype)
        flat.grad[: held.stop - held.start] = flatten(gradients, sliced, index, tensor)[held]
        sent_before = inside.tensor.ledger.total_bytes
        waits = any(item.plan.low_rank and not item.has_basis for item in optimizer.sync.items)
        optimizer.step()
        quiet = config.qh_mode != "factored" and step % config.sync_interval and step > 1 and not waits
        assert not quiet or inside.tensor.ledger.total_bytes == sent_before, "a step needs no tensor communication"
        flat.grad.fill_(float("nan"))  # engines reuse their flat gradient buffers
        optimizer.end_attempt()
        after = {name: weights[step - 1, replica] for name, weights in expected.items()}
        found = flat.detach()[: held.stop - held.start]
        # Relative to the largest weight of all: a fragment may hold nothing but small ones.
        scale = max(float(weight.abs().max()) for weight in after.values())
        off = (found - flatten(after, sliced, index, tensor)[held]).abs()
        worst = max(worst, float(off.max()) / scale if found.numel() else 0.0)
    check_copies(optimizer, inside.tensor)
    return worst, check_duplicates(optimizer, inside.shard)


def check_copies(optimizer: LoRDO, tensor: InsideComm) -> None:
    """What every tensor index keeps whole is bitwise equal on all: bases, row means, unsliced weights and states."""
    assert optimizer.sync is not None
    mine = {}
    for item in optimizer.sync.items:
        kept = item.state if item.duplicated else {k: item.state.get(k) for k in ("basis", "row_mean_sq")}
        mine.update({f"{item.plan.name} {k}": v.clone() for k, v in kept.items() if isinstance(v, Tensor)})
        if item.duplicated:
            mine[f"{item.plan.name} weight"] = item.weight.clone()
    everybody: list[Any] = [mine] * tensor.size
    if tensor.size > 1:
        assert any(item.duplicated for item in optimizer.sync.items)
        dist.all_gather_object(everybody, mine, group=tensor.group)
    for key, value in mine.items():
        assert all(torch.equal(each[key], value) for each in everybody), f"{key} differs between tensor indices"


def check_duplicates(optimizer: LoRDO, comm: InsideComm) -> int:
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


Key = tuple[str, str, torch.dtype]


def keys_of(name: str, shards: int, tensor: int = 1, sliced: str = "usual") -> list[Key]:
    """One shard has nothing to cut. Where elements go is the same in every precision: odd cuts and slices are fp64."""
    cut_oddly = ("paper", "factored_error_feedback", "spectral", "owners") if tensor == 1 else ("spectral", "owners")
    odd = CUTS[1:] if shards > 1 and name in cut_oddly else ()
    dtypes = (torch.float64, torch.float32) if sliced == "usual" else (torch.float64,)
    return [(name, "equal", dtype) for dtype in dtypes] + [(name, kind, torch.float64) for kind in odd]


@once
def all_differences(replicas: int, shards: int, tensor: int, sliced: str) -> Found[Key]:
    keys = itertools.chain.from_iterable(keys_of(name, shards, tensor, sliced) for name in CASES)
    cases = {}
    for name, kind, dtype in keys:
        settings = {**BASE, **CASES[name]}
        expected = trajectory(settings, facts(SLICES[sliced], 1), replicas, dtype, STEPS)
        cases[name, kind, dtype] = (expected, settings, kind, shards, tensor, SLICES[sliced], dtype)
    return run_cases(difference, replicas * shards * tensor, cases, timeout_s=280)


def farthest(run: Trajectory, exact: Trajectory) -> float:
    """As `difference` measures it: relative to the largest weight of a replica after that step."""
    off = torch.stack([(run[name] - exact[name]).abs().flatten(2).amax(2) for name in exact]).amax(0)
    scale = torch.stack([exact[name].abs().flatten(2).amax(2) for name in exact]).amax(0)
    return float((off / scale).max())


def check(name: str, replicas: int, shards: int, tensor: int = 1, sliced: str = "usual") -> None:
    found = all_differences(replicas, shards, tensor, sliced)
    for key in keys_of(name, shards, tensor, sliced):
        worst = max(value for value, _ in found[key])
        limit = 1e-6 if key[2] == torch.float64 else 1e-5
        if worst > limit and key[2] == torch.float32:
            limit = fp32_limit(farthest, {**BASE, **CASES[name]}, facts(SLICES[sliced], 1), replicas, steps=STEPS)
        assert worst < limit, f"{key}: {worst:.1e}, not below {limit:.1e}"


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("replicas", "shards"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)])
def test_fragments_follow_the_reference_on_every_layout(replicas: int, shards: int, case: str) -> None:
    check(case, replicas, shards)


@pytest.mark.distributed
@pytest.mark.parametrize(("replicas", "shards"), [(1, 2), (1, 3), (2, 2)])
def test_what_several_shards_keep_is_compared_between_them(replicas: int, shards: int) -> None:
    found = all_differences(replicas, shards, 1, "usual")
    for rank in range(replicas * shards):
        assert sum(found[key][rank][1] for key in found) > 20


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sliced", SLICES)
@pytest.mark.parametrize(("replicas", "shards"), [(1, 1), (1, 2), (2, 1)])
def test_tensor_slices_follow_the_reference_of_the_whole_model(
    replicas: int, shards: int, sliced: str, case: str
) -> None:
    check(case, replicas, shards, 2, sliced)


def work_of_syncs(kind: str, shards: int) -> tuple[int, int, int, int]:
    """In two syncs of one replica: matrices that this shard orthogonalized, bytes that it sent the others for it.

    And how many matrices there are in the model, and their elements.
    """
    calls = []

    def counted(matrix: Tensor, summed: Any) -> Tensor:
        calls.append(tuple(matrix.shape))
        return orthogonalized(matrix, summed)

    outer_step.orthogonalized = counted  # type: ignore[assignment]
    weights = flatten(problems.initial_weights(torch.float32), {}, 0, 1)
    groups = groups_of(shards, 1)
    problem, flat, held = flat_problem(kind, shards, groups.shard_index, facts({}, 1), weights)
    optimizer = LoRDO([flat], **{**BASE, "outer": {"momentum": 0.7, "orthogonalize": True}, "sync_interval": 1})
    optimizer.managed = True
    comm = InsideComm(groups.shard)
    optimizer.attach([problem], ReplicaWire(), InsideReplica(shard=comm, everyone=InsideComm(groups.inside)))
    for step in (1, 2):
        flat.grad = torch.zeros_like(flat)
        flat.grad[: held.stop - held.start] = flatten(problems.gradients(step, 0, torch.float32), {}, 0, 1)[held]
        optimizer.step()
        optimizer.end_attempt()
    assert optimizer.sync is not None
    matrices = [item.plan.numel for item in optimizer.sync.items if item.plan.low_rank]
    return len(calls), comm.ledger.by_kind["outer"], len(matrices), sum(matrices)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["equal", "one_shard_almost_everything"])
def test_each_matrix_is_orthogonalized_on_one_shard_and_travels_there_and_back_at_most(kind: str) -> None:
    syncs, shards, width = 2, 2, 4
    work = run_ranks(work_of_syncs, shards, kind, shards)
    matrices, elements = work[0][2:]
    assert matrices > 3
    assert sum(calls for calls, *_ in work) == syncs * matrices
    assert sum(sent for _, sent, *_ in work) <= syncs * 2 * elements * width
    assert all(calls > 0 for calls, *_ in work)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_replicas_of_two_shards_of_two_slices_follow_the_reference(case: str) -> None:
    check(case, 2, 2, 2)
