"""At every ZeRO stage: accumulation, clipping, unused parameters, skipped steps, and what crosses replicas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lordo_ds
from lordo_ds.core.schedule import sync_plan
from lordo_ds.errors import SyncError
from lordo_ds.sync.first_basis import first_bases_bytes
from tests.cases import Found, once, run_cases
from tests.collectives import CollectiveCounter
from tests.engines import GivenGradients, make_engine, settings, train_step
from tests.integration.test_zero_trajectories import STAGES, fragments_of, zero
from tests.ranks import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]


class Net(nn.Module):
    """A loss over samples, and a matrix that no gradient ever reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.out = nn.Linear(6, 9), nn.Linear(9, 4)
        self.unused = nn.Linear(5, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.inner(x))).square().mean()


def whole_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter, assembled from the fragments of this replica's shards."""
    hook = lordo_ds.hook(engine)
    assert hook is not None and hook.optimizer.sync is not None
    whole = {}
    for item in hook.optimizer.sync.items:
        full = torch.zeros(item.plan.numel)
        start, stop = item.intervals[item.comm.index]
        full[start:stop] = item.weight
        whole[item.plan.name] = item.comm.sum_(full, "test")
    return whole


def train_net(stage: int, shards: int, micro: int, accumulation: int) -> dict[str, Any]:
    """Seven steps of 4 samples per replica and step, whatever the number of its ranks."""
    keys = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    config = settings(optimizer={"replica_size": shards}, **zero(stage), **keys)
    config["gradient_clipping"] = 0.05
    engine = make_engine(config, Net())
    replica, shard = divmod(dist.get_rank(), shards)
    data = torch.Generator().manual_seed(11 + replica)
    norms = []
    for _ in range(7):
        samples = torch.randn(4, 6, generator=data).chunk(shards)[shard]
        for chunk in samples.chunk(accumulation):
            engine.backward(engine(chunk))
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return {"weights": whole_weights(engine), "norms": norms, "steps": engine.global_steps}


@once
def all_nets(shards: int) -> Found[tuple[int, int]]:
    """By stage and accumulation, on two replicas."""
    ways = [(4 // shards, 1), (2 // shards, 2)]
    return run_cases(
        train_net, 2 * shards, {(stage, n): (stage, shards, micro, n) for stage in STAGES for micro, n in ways}
    )


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_clipping_and_unused_parameters_agree_at_every_stage_and_shard_count(
    stage: int, accumulation: int, shards: int
) -> None:
    unsharded = all_nets(1)[0, 1]
    assert all(norm > 0.05 for norm in unsharded[0]["norms"]), "the norms are never clipped"
    for rank, found in enumerate(all_nets(shards)[stage, accumulation]):
        _same(found, unsharded[rank // shards], f"rank {rank}")


def _same(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    assert found["steps"] == expected["steps"] == 7, what
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5), what
    for name, weight in found["weights"].items():
        whole = expected["weights"][name].flatten()
        torch.testing.assert_close(weight, whole, rtol=0, atol=2e-6, msg=f"{what}: {name}")


def overflow(stage: int, bad_steps: list[int]) -> dict[str, Any]:
    """fp16 on 2 replicas x 2 shards; one rank of replica 1 overflows."""
    engine = make_engine(settings("fp16", {"replica_size": 2}, **zero(stage)))
    for step in range(1, 10):
        train_step(engine, step, spoil=math.inf if dist.get_rank() == 3 and step in bad_steps else None)
    status = lordo_ds.status(engine)
    return {
        "skipped": engine.skipped_steps,
        "steps": engine.global_steps,
        "executed": status["executed_steps"],
        "syncs": status["syncs"],
        "weights": {name: tensor for name, (_, tensor) in fragments_of(engine).items()},
    }


BAD_STEPS = {"first": [1], "due": [3], "three": [4, 5, 6]}


@once
def overflows_at_all_stages() -> Found[tuple[int, str]]:
    cases = {(stage, bad): (stage, steps) for stage in (0, 2, 3) for bad, steps in BAD_STEPS.items()}
    return run_cases(overflow, 4, cases, timeout_s=200)


@pytest.mark.parametrize("bad", BAD_STEPS)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_skipped_step_on_one_replica_neither_hangs_nor_drifts_at_any_stage(stage: int, bad: str) -> None:
    ranks = overflows_at_all_stages()[stage, bad]
    for rank, found in enumerate(ranks):
        assert found["skipped"] == (len(BAD_STEPS[bad]) if rank >= 2 else 0), f"rank {rank}"
        assert (found["steps"], found["executed"], found["syncs"]) == (9, 9, 3), f"rank {rank}"
        for name, weight in found["weights"].items():
            assert bool(torch.isfinite(weight).all()), name
            assert torch.equal(weight, ranks[rank % 2]["weights"][name]), f"{name}: replicas differ"


def bytes_per_step(stage: int, optimizer: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Per step on 2 replicas x 2 shards: bytes across replicas counted from outside, in the ledger, predicted."""
    found = []
    with CollectiveCounter() as counter:
        engine = make_engine(settings(optimizer={**optimizer, "replica_size": 2}, **zero(stage)), GivenGradients())
        hook = lordo_ds.hook(engine)
        assert hook is not None and hook.optimizer.sync is not None
        sync = hook.optimizer.sync
        for step in range(1, 8):
            counter.phase(f"step {step}")
            before, rows = hook.bytes_sent, len(sync.rows.pending)
            train_step(engine, step)
            crossing = [r for r in counter.crossing(lambda rank: rank // 2) if r.phase == f"step {step}"]
            # Two replicas: an all-reduce sends its payload once (2 (M-1)/M = 1), an all-gather too (M-1 = 1).
            assert {record.op for record in crossing} <= {"all_reduce", "all_gather_into_tensor"}
            counted = sum(record.payload_bytes for record in crossing)
            plan = sync_plan(hook.optimizer.config, step)
            predicted = sync.predicted_bytes(plan, rows, 1) if plan.due else 0
            if step == 1:
                predicted += first_bases_bytes(sync.bases, sync.wire)
            found.append((counted, hook.bytes_sent - before, predicted))
            hook.record(loss=1.0)
    return found


def rows_of_one_rank() -> str:
    engine = make_engine(settings(optimizer={"replica_size": 2}, **zero(1)))
    hook = lordo_ds.hook(engine)
    assert hook is not None
    try:
        for step in range(1, 4):
            train_step(engine, step)
            if dist.get_rank() % 2 == 0:
                hook.record(loss=1.0)
    except SyncError as error:
        return str(error)
    return ""


def test_rows_that_one_rank_of_a_replica_records_are_refused_on_all() -> None:
    assert all("on every rank, found" in found for found in run_ranks(rows_of_one_rank, 4))


BYTES: dict[str, dict[str, Any]] = {
    "paper": {},
    "recommended": {"preset": "recommended", "error_feedback": "bf16"},
}


@once
def bytes_at_all_stages() -> Found[tuple[int, str]]:
    cases = {(stage, case): (stage, optimizer) for stage in STAGES for case, optimizer in BYTES.items()}
    return run_cases(bytes_per_step, 4, cases, timeout_s=200)


@pytest.mark.parametrize("case", BYTES)
@pytest.mark.parametrize("stage", STAGES)
def test_bytes_cross_replicas_at_syncs_only_and_as_predicted_at_every_stage(stage: int, case: str) -> None:
    for steps in bytes_at_all_stages()[stage, case]:
        for step, (counted, ledger, predicted) in enumerate(steps, start=1):
            assert counted == ledger == predicted, f"step {step}: {counted}, {ledger}, {predicted}"
            assert (counted > 0) == (step == 1 or step % 3 == 0), f"step {step}"


@pytest.mark.parametrize("case", BYTES)
def test_ranks_that_hold_the_same_send_as_much_together_as_shards_do(case: str) -> None:
    whole, cut = (
        sum(counted for steps in bytes_at_all_stages()[stage, case] for counted, _, _ in steps) for stage in (0, 1)
    )
    assert abs(whole / cut - 1) < 0.05, f"ranks that hold the same send {whole}, shards {cut}"
