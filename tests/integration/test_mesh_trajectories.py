"""TP x PP x replicas x shards: a GPT follows the trajectory of the run without model parallelism, step by step.

The same replicas see the same samples everywhere; weights are compared whole, by the names of the model in one piece.
Adam turns the rounding noise of a vanishing gradient into full steps, and a leading subspace without a spectral gap
is ill-conditioned: an eps of the size of the gradients keeps the comparison one of the parallel layouts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lordo_ds
from megatron_patches.params import describe_model, whole
from pretrain.gpt import loss_sums
from tests.cases import Found, once, run_cases
from tests.collectives import CollectiveCounter
from tests.engines import weights as weights_of
from tests.gpts import TIED, UNTIED, build_module, micro_batch, start_megatron

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.megatron,
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs Megatron on the CPU"),
]

MODELS = {"tied": TIED, "untied": UNTIED}
STEPS, MICRO_BATCHES = 7, 2  # two syncs, and a step on what the second one left
LORDO = {"lr": 0.02, "eps": 1e-2, "rank": 8, "sync_interval": 3, "preset": "recommended", "weight_decay": 0.01}
# Two replicas step on both by themselves; here each matrix on its owner.
OWNERS = {"compute": "owner"}


Layout = tuple[int, int, int, int]
"""Tensor-parallel size, pipeline stages, shards, ZeRO stage."""


def train(
    tensor: int, pipe: int, shards: int, stage: int, model: str, streaming: dict[str, int] | None = None
) -> dict[str, Any]:
    """What this rank saw: weights by name after every step (whole), gradient norms, reports, bytes."""
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    start_megatron(tensor, pipe)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES // shards,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {
            "type": "LoRDO",
            "params": {**LORDO, "replica_size": shards, "outer": OWNERS, "streaming": streaming or {}},
        },
        "steps_per_print": 10**9,
    }
    module, mpu = build_module(MODELS[model], torch.float32, pipe)
    engine = deepspeed.initialize(model=module, config=config, mpu=mpu)[0]
    hook = lordo_ds.hook(engine)
    assert hook is not None
    found: dict[str, Any] = {"weights": [], "norms": [], "bytes": []}
    replica_of = _replica_of_ranks(hook)
    for step in range(STEPS):
        first = hook.data_parallel_rank * engine.gradient_accumulation_steps()
        batches = [micro_batch(step, first + i) for i in range(engine.gradient_accumulation_steps())]
        sent = hook.bytes_sent
        with CollectiveCounter() as counter:
            _step(engine, batches)
        if not streaming:  # which sends beside the steps
            _check_traffic(hook, step + 1, hook.bytes_sent - sent, counter.crossing(replica_of))
        found["norms"].append(float(engine.get_global_grad_norm() or 0.0))
        found["weights"].append(_whole_weights(engine, module, pipe))
    _check_equal_inside(hook)
    found["report"] = lordo_ds.status(engine)["last_sync"]
    found["status"] = lordo_ds.status(engine)
    engine.destroy()
    return found


def _step(engine: Any, batches: list[dict[str, Tensor]]) -> None:
    if hasattr(engine, "train_batch"):
        engine.train_batch(iter([(b["tokens"], (b["labels"], b["loss_mask"])) for b in batches]))
        return
    for batch in batches:
        total, count = loss_sums(engine, batch)
        engine.backward(total / count)
        engine.step()


def _replica_of_ranks(hook: Any) -> list[int]:
    replicas: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(replicas, hook.replica_index)
    return replicas


def _check_traffic(hook: Any, step: int, sent: int, crossing: list[Any]) -> None:
    """Across replicas something travels at syncs only (and for the first basis), and as much as predicted."""
    from lordo_ds.core.schedule import sync_plan

    sync, plan = hook.optimizer.sync, sync_plan(hook.optimizer.config, step)
    if hook.replicas == 1:
        assert not crossing and not sent
    elif not plan.due and step > 1:
        assert not crossing and not sent, (step, crossing)
    elif plan.due:
        assert crossing and sent == sync.predicted_bytes(plan, 0, 0), (step, sent, sync.predicted_bytes(plan, 0, 0))


def _whole_weights(engine: Any, module: Any, pipe: int) -> dict[str, Tensor]:
    """This stage's weights, tensor slices put together, by the names of the model in one piece."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    mine, found = weights_of(engine), {}
    for _, facts in describe_model(module):
        name = module.name_in_one_piece(facts.name) if pipe > 1 else facts.name
        value = mine[name]
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, value.contiguous(), group=group)
        if facts.dim is None:
            assert all(torch.equal(part, parts[0]) for part in parts), f"copies of {facts.name} differ"
        found[name] = parts[0] if facts.dim is None else whole(parts, facts.dim, facts.stride)
    return found


def _check_equal_inside(hook: Any) -> None:
    """A matrix's basis is bitwise equal on every rank of its replica and stage, slices and shards alike."""
    sync = hook.optimizer.sync
    mine = {}
    for item in sync.items:
        if item.plan.low_rank:
            mine[item.plan.name] = item.whole_basis().clone()
    everybody: list[Any] = [mine] * hook.groups.tensor_size
    dist.all_gather_object(everybody, mine, group=hook.groups.tensor)
    shards: list[Any] = [mine] * hook.groups.layout.replica_size
    dist.all_gather_object(shards, mine, group=hook.groups.shard)
    for other in (*everybody, *shards):
        assert all(torch.equal(other[name], basis) for name, basis in mine.items())


@once
def trained(replicas: int, *layouts: Layout, delay: int | None = None) -> Found[tuple[str, Layout]]:
    """Layouts of one size in one launch, both models; with a delay, in two fragments of the model."""
    streaming = None if delay is None else {"fragments": 2, "delay_steps": delay}
    cases = {(model, layout): (*layout, model, streaming) for layout in layouts for model in MODELS}
    tensor, pipe, shards, _ = layouts[0]
    return run_cases(train, tensor * pipe * shards * replicas, cases, timeout_s=240)


def compare(replicas: int, layouts: list[Layout], model: str, delay: int | None = None) -> None:
    """With the runs without model parallelism, one rank per replica."""
    alone: Layout = (1, 1, 1, 0)
    found, expected = trained(replicas, *layouts, delay=delay), trained(replicas, alone, delay=delay)[model, alone]
    for layout in layouts:
        _compare(found[model, layout], expected, replicas, layout, model)


def _compare(
    runs: list[dict[str, Any]], expected: list[dict[str, Any]], replicas: int, layout: Layout, model: str
) -> None:
    tensor, pipe, shards, _ = layout
    for rank, found in enumerate(runs):
        replica = rank % (tensor * shards * replicas) // (tensor * shards)
        one = expected[replica]
        moved = one["weights"][-1]["decoder.final_layernorm.weight"] - 1.0
        assert float(moved.abs().max()) > 0.01, "this run trains nothing"
        for step, (mine, theirs) in enumerate(zip(found["weights"], one["weights"], strict=True), start=1):
            scale = max(float(weight.abs().max()) for weight in theirs.values())
            for name, weight in mine.items():
                error = float((weight - theirs[name]).abs().max()) / scale
                assert error < 1e-5, f"{layout} rank {rank} step {step} {name}: {error:.1e}"
        assert found["norms"] == pytest.approx(one["norms"], rel=1e-4), layout
        for key in ("drift", "overlap", "captured_gradient_energy"):
            assert found["report"][key] == pytest.approx(one["report"][key], rel=1e-2, abs=1e-4), (layout, key)
        _check_ledgers(found["status"], replicas, layout, model)
        for key in ("low_rank_parameters", "low_rank_elements", "dense_parameters", "dense_elements"):
            assert found["status"][key] == one["status"][key], (layout, key)
    if model == "tied":
        _check_tied_copies(runs, pipe)


def _check_ledgers(status: dict[str, Any], replicas: int, layout: Layout, model: str) -> None:
    """Bytes are counted for the group that they went to, and for no other."""
    tensor, pipe, shards, stage = layout
    sent, sharded = status["bytes_inside"], shards > 1 and stage > 0
    assert (sent["tensor"] > 0) == (tensor > 1)  # row sums of every step, refreshes
    assert (sent["shard"] > 0) == sharded
    assert (sent["pipe"] > 0) == (pipe > 1 and model == "tied")
    assert (sent["everyone"] > 0) == (tensor * pipe * shards > 1)
    assert (status["bytes_sent_total"] > 0) == (replicas > 1)
    assert all((seconds > 0) == (sent[axis] > 0) for axis, seconds in status["seconds_blocked_inside"].items())
    assert (status["seconds_blocked_total"] > 0) == (replicas > 1)
    assert status["tensor_parallel_size"] == tensor and status["pipeline_parallel_size"] == pipe


def _check_tied_copies(runs: list[dict[str, Any]], pipe: int) -> None:
    """What two stages hold of the tied embedding is bitwise equal after every step."""
    per_stage = len(runs) // pipe
    for first, last in ((rank, rank + (pipe - 1) * per_stage) for rank in range(per_stage)):
        for a, b in zip(runs[first]["weights"], runs[last]["weights"], strict=True):
            name = "embedding.word_embeddings.weight"
            assert torch.equal(a[name], b[name])


def _name(value: int | list[Layout]) -> str:
    if isinstance(value, int):
        return f"{value}_replicas"
    return "TP{}-PP{}-shards{}".format(*value[0][:3])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("replicas", "layouts"),
    [
        (1, [(2, 1, 1, 0)]),
        (1, [(1, 2, 1, 0)]),
        (1, [(1, 1, 2, stage) for stage in (0, 1)]),
        (1, [(2, 2, 1, stage) for stage in (0, 1)]),
        (1, [(2, 1, 2, stage) for stage in (1, 3)]),
        (1, [(1, 2, 2, stage) for stage in (0, 1)]),
        (2, [(2, 1, 1, 0)]),
        (2, [(1, 2, 1, stage) for stage in (0, 1)]),
        (2, [(1, 1, 2, stage) for stage in (0, 1)]),
    ],
    ids=_name,
)
def test_every_layout_follows_the_run_without_model_parallelism(
    replicas: int, layouts: list[Layout], model: str
) -> None:
    compare(replicas, layouts, model)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layouts", [[(2, 1, 1, 0)], [(1, 2, 1, stage) for stage in (0, 1)]], ids=_name)
def test_fragments_of_the_model_are_the_same_in_every_layout(layouts: list[Layout], model: str) -> None:
    """They are cut from the whole model, whichever stages and slices it lies on, and land there alike."""
    compare(2, layouts, model, delay=1)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("replicas", "layouts"),
    [
        (1, [(4, 1, 1, 0)]),
        (2, [(2, 2, 1, stage) for stage in (0, 1)]),
        (1, [(2, 2, 2, stage) for stage in (0, 1)]),
        (2, [(2, 1, 2, stage) for stage in (0, 1)]),
        (2, [(1, 2, 2, stage) for stage in (0, 1)]),
    ],
    ids=_name,
)
def test_layouts_of_more_processes_follow_it_too(replicas: int, layouts: list[Layout], model: str) -> None:
    compare(replicas, layouts, model)
