"""All replicas in one process: the trajectories of the reference, the bytes of the real wire."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lab.model import SIZES, ReplicatedGpt
from lab.replicas import Replicas
from lab.run import Run, execute
from lab.spec import RunSpec
from lordo_ds import LoRDO, LordoConfig, SyncError
from lordo_ds.core.grouping import plan_parameters
from lordo_ds.core.reference import Reference
from tests import problems
from tests.ranks import run_ranks
from trials.contender import BASELINES, table

BASE = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "rank": 3, "sync_interval": 3}
OUTER = {"lr": 0.7, "momentum": 0.7}
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "recommended": {"preset": "recommended"},
    "no_term": {"qh_mode": "none"},
    "low_rank_term": {"qh_mode": "low_rank"},
    "local": {"projection": "local"},
    "gradient_outer": {"basis_source": "gradient", "outer": OUTER},
    "complement": {"basis_source": "complement", "error_feedback": "fp32", "rank": 2},
    "warm_up": {"sync_warmup_steps": 4, "outer": OUTER},
    "all_dense": {"low_rank": {"exclude": [".*"]}, "outer": OUTER},
    "moments_never_averaged": {"moment_sync_interval": "never"},
    "bf16_wire": {"pseudo_gradient_dtype": "bf16", "outer": {"compute": "everyone"}},
    "int4_wire": {"pseudo_gradient_dtype": "int4", "outer": {**OUTER, "compute": "everyone"}},
    "owners": {"outer": {**OUTER, "compute": "owner"}},
    "owners_int8_wire": {"preset": "recommended", "pseudo_gradient_dtype": "int8", "outer": {"compute": "owner"}},
    "sparse_wire": {"preset": "recommended", "pseudo_gradient_dtype": {"top_k": 8, "block": 64}},
}
STEPS = 10


def virtual(settings: dict[str, Any], M: int) -> tuple[Replicas, list[list[tuple[str, torch.nn.Parameter]]]]:
    weights = [problems.initial_weights(torch.float64) for _ in range(M)]
    named = [[(name, torch.nn.Parameter(weight)) for name, weight in one.items()] for one in weights]
    facts = {fact.name: fact for fact in problems.facts()}
    return Replicas(named, facts, {**BASE, **settings}), named


def give_gradients(named: list[list[tuple[str, torch.nn.Parameter]]], step: int) -> None:
    for m, parameters in enumerate(named):
        gradients = problems.gradients(step, m, torch.float64)
        for name, parameter in parameters:
            parameter.grad = gradients[name]


@pytest.mark.parametrize("M", [1, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_replicas_in_one_process_follow_the_reference(case: str, M: int) -> None:
    replicas, named = virtual(CASES[case], M)
    config = LordoConfig.parse({**BASE, **CASES[case]})
    plans = plan_parameters(config, problems.facts())
    reference = Reference(config, plans, [problems.initial_weights(torch.float64) for _ in range(M)])
    for step in range(1, STEPS + 1):
        give_gradients(named, step)
        replicas.step(BASE["lr"])
        reference.step([problems.gradients(step, m, torch.float64) for m in range(M)])
    for m, parameters in enumerate(named):
        for name, parameter in parameters:
            expected = reference.weights[m][name]
            assert float((parameter.detach() - expected).abs().max() / expected.abs().max()) < 1e-6, (m, name)
    replicas.close()


def bytes_on_real_ranks(case: str) -> dict[str, int]:
    """Of this rank, with the same problem over gloo."""
    named = [(name, torch.nn.Parameter(w)) for name, w in problems.initial_weights(torch.float64).items()]
    optimizer = LoRDO(named, **{**BASE, **CASES[case]})
    for step in range(1, STEPS + 1):
        gradients = problems.gradients(step, dist.get_rank(), torch.float64)
        for name, parameter in named:
            parameter.grad = gradients[name]
        optimizer.step()
    optimizer.final_sync()
    assert optimizer.sync is not None
    return dict(optimizer.sync.wire.ledger.by_kind)


COUNTED = (
    "recommended",
    "gradient_outer",
    "warm_up",
    "bf16_wire",
    "int4_wire",
    "owners",
    "owners_int8_wire",
    "sparse_wire",
)


def bytes_of_some_cases() -> dict[str, dict[str, int]]:
    return {case: bytes_on_real_ranks(case) for case in COUNTED}


@pytest.mark.distributed
def test_the_virtual_wire_counts_the_bytes_of_the_real_one() -> None:
    for m, real in enumerate(run_ranks(bytes_of_some_cases, 2)):
        for case, sent in real.items():
            replicas, named = virtual(CASES[case], 2)
            for step in range(1, STEPS + 1):
                give_gradients(named, step)
                replicas.step(BASE["lr"])
            replicas.finish()
            sync = replicas.optimizers[m].sync
            assert sync is not None and dict(sync.wire.ledger.by_kind) == sent, case
            replicas.close()


def test_an_error_on_one_replica_ends_the_step_of_all() -> None:
    replicas, named = virtual({"sync_interval": 1, "max_nonfinite_syncs": 1}, 3)
    for parameters in named:
        for _, parameter in parameters:
            parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.raises(SyncError, match="no replica was finite"):
        replicas.step(1e-2)
    replicas.close()


def test_every_replica_of_the_batched_model_is_a_model_of_its_own() -> None:
    size, cpu = SIZES["nano"], torch.device("cpu")
    together = ReplicatedGpt(size, 3, 0, cpu)
    for stack in together.weights.values():
        stack.data += 0.1 * torch.randn(stack.shape, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(size.vocab, (3, 2, size.seq_length + 1), generator=torch.Generator().manual_seed(2))
    losses = together.losses(tokens)
    gradients = torch.autograd.grad(losses.sum(), list(together.weights.values()))
    for m in range(3):
        alone = ReplicatedGpt(size, 1, 0, cpu)
        for name, stack in alone.weights.items():
            stack.data.copy_(together.weights[name].data[m : m + 1])
        loss = alone.losses(tokens[m : m + 1])
        assert torch.allclose(loss[0], losses[m], rtol=1e-6)
        own = torch.autograd.grad(loss.sum(), list(alone.weights.values()))
        for name, mine, theirs in zip(alone.weights, own, gradients, strict=True):
            assert torch.allclose(mine[0], theirs[m], rtol=1e-4, atol=1e-6), name


def nano(method: str = "x", **keys: object) -> RunSpec:
    base = {"model": "nano", "replicas": 2, "sequences": 4, "steps": 8, "lr": 1e-2, "seed": 0, "validation": 8}
    return RunSpec(**{**base, "method": method, "settings": {"rank": 4, "sync_interval": 4}, **keys})  # type: ignore


def test_a_run_is_a_function_of_its_spec() -> None:
    first, second = execute(nano()), execute(nano())
    assert first.pop("wall_s") >= 0 and second.pop("wall_s") >= 0
    assert str(first) == str(second)
    assert execute(nano(seed=1))["val_loss"] != first["val_loss"]


def test_the_slow_outer_step_is_the_outer_step_of_one_replica() -> None:
    dense = {"replica_size": "all", "low_rank": {"exclude": [".*"]}}
    warm = {"sync_warmup_steps": 3}
    slow = nano(slow={"interval": 4, **OUTER}, settings={**dense, **warm, "sync_interval": 1})
    own = nano(settings={**dense, **warm, "sync_interval": 4, "outer": OUTER})
    assert execute(slow)["val_loss"] == pytest.approx(execute(own)["val_loss"], abs=1e-6)


def test_all_ranks_as_one_replica_see_the_tokens_that_replicas_see() -> None:
    one = Run(nano(settings={"replica_size": "all", "rank": 4}), torch.device("cpu"))
    two = Run(nano(), torch.device("cpu"))
    a = one.text.batch(0, 3, 1, 4, 16)
    b = two.text.batch(0, 3, 2, 4, 16)
    assert torch.equal(a.flatten(0, 1), b.flatten(0, 1))
    assert not torch.equal(a, one.text.batch(1, 3, 1, 4, 16)) and not torch.equal(a, one.text.batch(0, 4, 1, 4, 16))
    one.replicas.close(), two.replicas.close()


def test_one_replica_is_charged_what_its_ranks_would_exchange_at_every_step() -> None:
    dense = {"replica_size": "all", "low_rank": {"exclude": [".*"]}, "sync_interval": 1}
    low_rank = {"replica_size": "all", "qh_mode": "none", "basis_source": "gradient", "sync_interval": 1, "rank": 4}
    full = execute(nano(settings=dense))
    assert full["bytes"] == full["bytes_ddp"] == 8 * 4 * sum(p.numel() for p in _parameters())
    assert execute(nano(settings=low_rank))["bytes"] < full["bytes"]
    assert execute(nano(settings={**low_rank, "qh_mode": "full_rank"}))["bytes"] == full["bytes"]


def test_what_is_placed_with_the_anchor_is_counted_apart() -> None:
    elements = sum(p.numel() for p in _parameters())
    outer = {"rank": 4, "sync_interval": 4, "outer": {**OUTER, "compute": "everyone"}}
    plain, lossy = execute(nano(settings=outer)), execute(nano(settings={**outer, "pseudo_gradient_dtype": "int8"}))
    assert plain["host_state_bytes"] == 2 * 4 * elements  # the anchor, the momentum
    # Of two replicas the owner of the longer half: what it has not told yet.
    owned = lossy["host_state_bytes"] // 4 - 3 * elements
    assert elements / 2 <= owned < elements / 2 + 256
    assert lossy["state_bytes"] - lossy["host_state_bytes"] == plain["state_bytes"] - plain["host_state_bytes"]
    at_owners = execute(nano(settings={**outer, "outer": {**OUTER, "compute": "owner"}}))
    assert elements * 4 < at_owners["host_state_bytes"] < plain["host_state_bytes"]


def test_a_bench_shows_what_is_placed_with_the_anchor_apart() -> None:
    sizes = {"exp_avg": 1, "anchor": 2, "owner_momentum": 3, "wire_error": 4, "owner_error": 5}
    assert "| 1.0 + 14.0 |" in table_of({kind: size * 2**20 for kind, size in sizes.items()})
    assert "| 1.0 + 3.0 |" in table_of({"exp_avg": 2**20, "outer_momentum": 3 * 2**20})


def table_of(state_bytes: dict[str, int]) -> str:
    """Of a bench with one contender that keeps so much."""
    nothing: Counter[str] = Counter()
    one: dict[str, Any] = {key: nothing for key in ("train_step_s", "train_step_wall_s", "optimizer_step_s")}
    one |= {key: {name: nothing for name in BASELINES} for key in ("train_ratio", "optimizer_ratio")}
    one |= {"state_bytes": {**state_bytes, "total": sum(state_bytes.values())}, "peak_memory_bytes": None}
    return table({"processes": 1, "stage": 0, "contenders": {"one": one}})


def _parameters() -> list[torch.Tensor]:
    return list(ReplicatedGpt(SIZES["nano"], 1, 0, torch.device("cpu")).weights.values())
