"""Copies inside a replica: weights tied across pipeline stages, whole parameters on every tensor index."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lordo_ds import ConfigError, LoRDO, LordoConfig
from lordo_ds.comm.groups import make_groups, replica_groups
from lordo_ds.comm.inside import InsideComm, InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.core.fragments import FlatTensor, Piece, whole
from lordo_ds.core.grouping import ParameterFacts, plan_parameters
from lordo_ds.core.mesh import replica_layout
from lordo_ds.core.reference import Reference
from lordo_ds.errors import SyncError
from lordo_ds.replica.copies import TiedWeight
from tests import problems
from tests.ranks import RankFailedError, run_ranks

pytestmark = pytest.mark.distributed

SETTINGS = {"lr": 1e-2, "eps": 1e-2, "rank": 3, "sync_interval": 3, "preset": "recommended"}
# The last stage has no matrix to project, only its copy of the tied embedding and a bias.
STAGES = (("wide", "tall"), ("bias", "wide"))
TIED = "wide"


def _facts() -> dict[str, ParameterFacts]:
    return {fact.name: fact for fact in problems.facts() if fact.name in {"wide", "tall", "bias"}} | {
        TIED: ParameterFacts(TIED, problems.SHAPES[TIED], embedding=True)
    }


def pipeline_of_two_stages(shards: int, spoil_tied_gradient: bool = False, **changes: Any) -> float:
    """Ranks are pipe x replica x shard; returns how far this rank's weights are from the reference."""
    world, me = dist.get_world_size(), dist.get_rank()
    stage, data_parallel = divmod(me, world // 2)
    groups = replica_groups(
        replica_layout(range(stage * world // 2, (stage + 1) * world // 2), shards, world), None, pipe_size=2
    )
    replicas, replica, shard = groups.layout.replica_count, groups.replica_index, groups.shard_index
    facts, names, weights = _facts(), STAGES[stage], problems.initial_weights(torch.float32)
    flat_weights = torch.cat([weights[name].flatten() for name in names])
    width = -(-len(flat_weights) // shards)
    held = slice(shard * width, min((shard + 1) * width, len(flat_weights)))
    pieces, at = [], 0
    for name in names:
        numel = weights[name].numel()
        cuts = [(max(at, i * width) - at, min(at + numel, (i + 1) * width) - at) for i in range(shards)]
        spans = tuple((a, b) if a < b else (0, 0) for a, b in cuts)
        pieces.append(Piece(facts[name], spans, max(0, at - held.start)))
        at += numel
    flat = torch.nn.Parameter(flat_weights[held].clone())
    first = replica * shards
    tied_ranks = [s * world // 2 + first + i for s in range(2) for i in range(shards)]
    inside = InsideReplica(shard=InsideComm(groups.shard if shards > 1 else None), everyone=InsideComm(groups.inside))
    assert inside.everyone.size == 2 * shards and data_parallel == first + shard
    tied_group, pair = make_groups([tied_ranks, [first + shard, world // 2 + first + shard]])
    tied = [TiedWeight(TIED, InsideComm(tied_group), stage, 2)]
    settings = {**SETTINGS, **changes}
    optimizer = LoRDO([flat], **settings)
    optimizer.managed = True
    optimizer.attach([FlatTensor(flat, tuple(pieces))], ReplicaWire(groups.replica), inside, tied)
    config = LordoConfig.parse(settings)
    starts = [problems.initial_weights(torch.float32) for _ in range(replicas)]
    reference = Reference(config, plan_parameters(config, list(facts.values())), starts)
    worst = 0.0
    for step in range(1, 9):
        each = [problems.gradients(step, m, torch.float32) for m in range(replicas)]
        mine = dict(each[replica])
        if spoil_tied_gradient and stage == 1:
            mine[TIED] = mine[TIED] * 0.5
        flat.grad = torch.cat([mine[name].flatten() for name in names])[held]
        optimizer.step()
        optimizer.end_attempt()
        reference.step(each)  # type: ignore[arg-type]
        expected = torch.cat([reference.weights[replica][name].flatten() for name in names])[held]
        worst = max(worst, float((flat.detach() - expected).abs().max()))
        copies: list[Any] = [None, None]
        whole_tied = torch.zeros(weights[TIED].numel())
        assert optimizer.sync is not None
        item = next(item for item in optimizer.sync.items if item.plan.name == TIED)
        start, stop = item.intervals[shard if shards > 1 else 0]
        whole_tied[start:stop] = item.weight
        inside.shard.sum_(whole_tied, "test")
        dist.all_gather_object(copies, whole_tied, group=pair)
        assert torch.equal(copies[0], copies[1]), f"the tied copies differ after step {step}"
    report = optimizer.last_report
    assert report is not None and report.overlap is not None and report.captured_gradient_energy is not None
    return worst


@pytest.mark.parametrize("average_dense_moments", [False, True])
@pytest.mark.parametrize(("replicas", "shards"), [(2, 1), (1, 2), (3, 1)])
def test_tied_copies_stay_equal_and_follow_the_reference(
    replicas: int, shards: int, average_dense_moments: bool
) -> None:
    ranks = 2 * replicas * shards
    worst = run_ranks(pipeline_of_two_stages, ranks, shards, average_dense_moments=average_dense_moments)
    assert max(worst) < 1e-5


@pytest.mark.parametrize("shards", [1, 2])
def test_a_tied_gradient_that_no_one_sums_stops_the_run(shards: int) -> None:
    with pytest.raises(RankFailedError, match=r"gradient of wide differs between the pipeline stages.* at step 1"):
        run_ranks(pipeline_of_two_stages, 2 * shards, shards, spoil_tied_gradient=True)


def two_tensor_indices(unlike: str) -> float:
    """One replica of two tensor indices that both hold the whole of `bias` and `tall`."""
    me = dist.get_rank()
    groups = replica_groups(replica_layout([me], 1, 1), [0, 1])
    inside = InsideReplica(tensor=InsideComm(groups.tensor), everyone=InsideComm(groups.inside))
    weights = problems.initial_weights(torch.float32)
    names = ["tall", "bias"] if unlike != "layout" or me == 0 else ["tall", "small"]
    parameters = {name: torch.nn.Parameter(weights[name]) for name in names}
    if unlike == "start" and me == 1:
        parameters["bias"].data += 1.0
    optimizer = LoRDO(list(parameters.values()), **{**SETTINGS, "low_rank": {"exclude": ["bias"]}})
    optimizer.managed = True
    flats = [
        FlatTensor(p, (Piece(ParameterFacts(name, tuple(p.shape)), whole(tuple(p.shape))),))
        for name, p in parameters.items()
    ]
    optimizer.attach(flats, ReplicaWire(), inside)
    for step in range(1, 5):
        gradients = problems.gradients(step, 0, torch.float32)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
            if unlike == "gradient" and me == 1 and name == "bias" and step == 3:
                parameter.grad = gradients[name] * 0.7
        optimizer.step()
        optimizer.end_attempt()
    return float(parameters[names[-1]].sum())


def test_a_partial_gradient_is_refused_at_the_next_sync_and_named() -> None:
    with pytest.raises(
        RankFailedError, match=r"the gradient of bias differs between the tensor-parallel ranks at step 3"
    ):
        run_ranks(two_tensor_indices, 2, "gradient")


def test_copies_that_start_differently_become_those_of_the_first_tensor_index() -> None:
    first, second = run_ranks(two_tensor_indices, 2, "start")
    assert first == second == run_ranks(two_tensor_indices, 2, "nothing")[0]


def test_tensor_indices_with_other_parameters_are_refused() -> None:
    with pytest.raises(RankFailedError, match="the tensor-parallel ranks hold other parameters than each other"):
        run_ranks(two_tensor_indices, 2, "layout")


def test_a_tied_weight_cannot_be_projected() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = LoRDO([weight], rank=2)
    flat = FlatTensor(weight, (Piece(ParameterFacts("head", (4, 3)), whole((4, 3))),))
    with pytest.raises(ConfigError, match="head is shared by several pipeline stages and cannot be projected"):
        optimizer.attach([flat], ReplicaWire(), InsideReplica(), [TiedWeight("head", InsideComm(), 0, 2)])


def test_sync_error_is_public() -> None:
    import lordo_ds

    assert issubclass(lordo_ds.SyncError, RuntimeError) and SyncError is lordo_ds.SyncError
