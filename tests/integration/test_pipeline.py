"""LoRDO in DeepSpeed's PipelineEngine: 2 stages against 1, tied weights, what crosses replicas, checkpoints."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

import lordo_ds
from lordo_ds import ConfigError
from lordo_ds.adapters.deepspeed import registration
from lordo_ds.adapters.deepspeed.pipeline import ReplicaGrid, tied_copies
from lordo_ds.core.schedule import sync_plan
from lordo_ds.sync.first_basis import first_bases_bytes
from tests.cases import Found, once, run_cases
from tests.collectives import CollectiveCounter
from tests.engines import DTYPES, load_in_this_process, make_engine, settings, weights
from tests.ranks import RankFailedError, run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]

PLAIN = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
# A matrix that several stages share cannot be projected.
OPTIMIZER = {"tied matrix": {"low_rank": {"exclude": ["mixer"]}}}
VOCABULARY, WIDTH, MICRO, ACCUMULATION = 11, 8, 2, 2


# -- models and data ---------------------------------------------------------------------------------


def logits(embedding: nn.Embedding, hidden: Tensor) -> Tensor:
    return hidden @ embedding.weight.T


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float()).square().mean()


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.float(), target)


class GatheredRows(torch.autograd.Function):
    """The whole of a matrix whose rows the tensor-parallel ranks share; each gets the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.index, ctx.rows = dist.get_rank(group), rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.detach().contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.narrow(0, ctx.index * ctx.rows, ctx.rows).contiguous(), None


class SlicedLinear(nn.Linear):
    """A linear layer whose weight is cut into rows, one part per tensor-parallel rank, and whose bias is not."""

    group: Any = None

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        group = SlicedLinear.group
        rows = self.weight.detach().chunk(dist.get_world_size(group))[dist.get_rank(group)]
        self.weight = nn.Parameter(rows.clone())
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, GatheredRows.apply(self.weight, SlicedLinear.group), self.bias)


def layers_of(kind: str) -> list[Any]:
    linear, tanh = LayerSpec(nn.Linear, WIDTH, WIDTH), LayerSpec(nn.Tanh)
    embedding = functools.partial(TiedLayerSpec, "embedding", nn.Embedding, VOCABULARY, WIDTH)
    mixer = TiedLayerSpec("mixer", nn.Linear, WIDTH, WIDTH, bias=False)
    sliced = LayerSpec(SlicedLinear, WIDTH)
    return {
        "untied": [linear, tanh, linear, tanh],
        "tied embedding": [embedding(), linear, tanh, linear, tanh, embedding(forward_fn=logits)],
        # Uniform over two stages: the second one has nothing to project.
        "uneven": [embedding(), linear, linear, tanh, tanh, embedding(forward_fn=logits)],
        "tied matrix": [mixer, tanh, linear, linear, tanh, mixer],
        "sliced": [sliced, tanh, sliced, tanh],
    }[kind]


def make_model(kind: str, stages: int, topology: Any = None) -> PipelineModule:
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    loss = squared_error if kind in ("untied", "tied matrix", "sliced") else cross_entropy
    return PipelineModule(
        layers=layers_of(kind),
        num_stages=None if topology else stages,
        topology=topology,
        loss_fn=loss,
        partition_method="uniform",
        seed_layers=True,
        base_seed=5,
    )


def batches(kind: str, dtype: str, data_rank: int, first_step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of one data-parallel rank, from a step on."""
    micro = (first_step - 1) * ACCUMULATION
    while True:
        generator = torch.Generator().manual_seed(1000 * data_rank + micro)
        if kind in ("untied", "tied matrix", "sliced"):
            pair = torch.randn(2, MICRO, WIDTH, generator=generator).to(DTYPES[dtype])
        else:
            pair = torch.randint(VOCABULARY, (2, MICRO, 3), generator=generator)
        yield (pair[0], pair[1]) if kind in ("untied", "tied matrix", "sliced") else (pair[0][:, 0], pair[1][:, 0])
        micro += 1


def config_of(stage: int, dtype: str = "fp32", optimizer: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return {
        **settings(dtype, optimizer, gradient_clipping=0.3, gradient_accumulation_steps=ACCUMULATION),
        "train_micro_batch_size_per_gpu": MICRO,
        "zero_optimization": {"stage": stage},
        **keys,
    }


def replica_of(stages: int, replica_size: int) -> Any:
    """The pipe axis is the slowest."""
    return lambda rank: rank % (dist.get_world_size() // stages) // replica_size


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def model_weights(engine: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


# -- trajectories ------------------------------------------------------------------------------------

# (model, ZeRO stage, precision, data-parallel ranks per replica)
CASES = [
    ("untied", 0, "fp32", 1),
    ("untied", 1, "fp32", 2),
    ("untied", 0, "bf16", 1),
    ("untied", 0, "bf16", 2),
    ("untied", 1, "fp16", 2),
    ("tied embedding", 0, "fp32", 1),
    ("tied embedding", 1, "fp32", 1),
    ("tied embedding", 1, "fp32", 2),
    ("tied embedding", 1, "bf16", 2),
    ("tied embedding", 0, "fp16", 1),
    ("tied matrix", 0, "fp32", 1),
    ("tied matrix", 1, "fp32", 2),
    ("uneven", 0, "fp32", 1),
    ("uneven", 1, "fp32", 2),
    ("uneven", 0, "bf16", 1),  # the last stage has no gradient that counts in the norm
]


def trained(kind: str, stage: int, dtype: str, replica_size: int, stages: int, steps: int) -> dict[str, Any]:
    """Per step: loss, norm, weights, bytes across replicas (counted, in the ledger, predicted) and their callers."""
    found: dict[str, Any] = {"steps": []}
    place = replica_of(stages, replica_size)
    with CollectiveCounter() as counter:
        optimizer = {"replica_size": replica_size, **OPTIMIZER.get(kind, {})}
        engine = make_engine(config_of(stage, dtype, optimizer), make_model(kind, stages))
        hook = lordo_ds.hook(engine)
        assert hook is not None and hook.optimizer.sync is not None
        sync, data = hook.optimizer.sync, batches(kind, dtype, hook.data_parallel_rank)
        for step in range(1, steps + 1):
            counter.phase(f"step {step}")
            before, rows = hook.bytes_sent, len(sync.rows.pending)
            loss = engine.train_batch(data)
            crossing = counter.crossing(place, phase=f"step {step}")
            plan = sync_plan(hook.optimizer.config, step)
            predicted = sync.predicted_bytes(plan, rows, 1) if plan.due else 0
            if step == 1:  # the first basis; a stage with nothing to project sends its flags
                predicted += first_bases_bytes(sync.bases, sync.wire)
            counter.phase("reading")
            found["steps"].append(
                {
                    "loss": float(loss),
                    "norm": float(engine.get_global_grad_norm()),
                    "masters": weights(engine),
                    "model": model_weights(engine),
                    "bytes": (sum(r.payload_bytes for r in crossing), hook.bytes_sent - before, predicted),
                    "callers": [r.where for r in crossing],
                }
            )
            hook.record(loss=float(loss))
    copies = {parameter for parameter, _ in tied_copies(engine.module)}
    found |= {
        "tied": [name for name, parameter in engine.module.named_parameters() if parameter in copies],
        "projected": sum(item.plan.low_rank for item in sync.items),
        "wrapper": type(engine.optimizer).__name__,
    }
    engine.destroy()
    return found


@once
def all_trained(stages: int, ranks: int, replica_size: int, steps: int = 7) -> Found[tuple[Any, ...]]:
    cases = {case: (*case, stages, steps) for case in CASES if case[3] == replica_size}
    return run_cases(trained, ranks, cases, timeout_s=280)


OFFLOAD = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
# precision and keys
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "offloaded": ("fp32", {"zero_optimization": OFFLOAD}),
    "round robin": ("fp32", {"zero_optimization": {"stage": 1, "round_robin_gradients": True}}),
    "fp32 accumulation": ("bf16", {"data_types": {"grad_accum_dtype": "fp32"}}),
    "overlapped": ("fp32", {"zero_optimization": {"stage": 1, "overlap_comm": True}}),
    "checkpointed": ("fp32", {"pipeline": {"activation_checkpoint_interval": 1, "use_reentrant": False}}),
}


def trained_with_options(stages: int, option: str) -> tuple[list[float], dict[str, Tensor]]:
    dtype, keys = OPTIONS[option]
    engine = make_engine(config_of(1, dtype, {"replica_size": 2}, **keys), make_model("tied embedding", stages))
    hook = lordo_ds.hook(engine)
    assert hook is not None
    data = batches("tied embedding", dtype, hook.data_parallel_rank)
    losses = [float(engine.train_batch(data)) for _ in range(5)]
    found = (losses, weights(engine))
    engine.destroy()
    return found


@once
def all_trained_with_options(stages: int) -> Found[str]:
    return run_cases(trained_with_options, 2 * stages, {option: (stages, option) for option in OPTIONS})


@pytest.mark.parametrize("option", OPTIONS)
def test_two_stages_train_as_one_does_with_the_options_of_zero_1(option: str) -> None:
    halves, whole = all_trained_with_options(2)[option], all_trained_with_options(1)[option]
    for rank, (losses, masters) in enumerate(halves):
        expected_losses, expected = whole[rank % 2]
        tolerance = 2e-3 if OPTIONS[option][0] == "bf16" else 2e-5
        assert losses == pytest.approx(expected_losses, rel=10 * tolerance)
        for name, weight in masters.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance, msg=name)


def ids(case: tuple[Any, ...]) -> str:
    return "-".join(str(part) for part in case)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_two_stages_train_as_one_does(case: tuple[Any, ...]) -> None:
    """Stages of one replica sum tied gradients in another order; all else is the same arithmetic."""
    _, _, dtype, replica_size = case
    halves, whole = all_trained(2, 4, replica_size)[case], all_trained(1, 2, replica_size)[case]
    # bf16 and fp16 gradients of tied weights are rounded before they are summed over the stages, or after.
    tolerance = 2e-5 if dtype == "fp32" else 2e-3
    for rank, expected in enumerate(whole):
        stages = [halves[rank], halves[rank + 2]]
        assert expected["wrapper"] == stages[0]["wrapper"] == stages[1]["wrapper"]
        for step, one in enumerate(expected["steps"], start=1):
            for two in (stage["steps"][step - 1] for stage in stages):
                assert two["loss"] == pytest.approx(one["loss"], rel=10 * tolerance), f"step {step}"
                assert two["norm"] == pytest.approx(one["norm"], rel=10 * tolerance), f"step {step}"
                for name, weight in two["masters"].items():
                    torch.testing.assert_close(weight, one["masters"][name], rtol=0, atol=tolerance)
            names = set(stages[0]["steps"][0]["masters"]) | set(stages[1]["steps"][0]["masters"])
            assert names == set(one["masters"])


@pytest.mark.parametrize("case", [case for case in CASES if case[3] == 1], ids=ids)
def test_one_replica_of_one_pipeline_trains_as_one_rank_does(case: tuple[Any, ...]) -> None:
    halves, (whole,) = all_trained(2, 2, 1)[case], all_trained(1, 1, 1)[case]
    tolerance = 2e-5 if case[2] == "fp32" else 2e-3
    for stage in halves:
        for one, two in zip(whole["steps"], stage["steps"], strict=True):
            assert two["norm"] == pytest.approx(one["norm"], rel=10 * tolerance)
            for name, weight in two["masters"].items():
                torch.testing.assert_close(weight, one["masters"][name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_every_rank_of_a_replica_has_its_norm_and_loss(case: tuple[Any, ...]) -> None:
    ranks = all_trained(2, 4, case[3])[case]
    for step in range(7):
        numbers = [(rank["steps"][step]["norm"], rank["steps"][step]["loss"]) for rank in ranks]
        assert numbers[0] == numbers[2] and numbers[1] == numbers[3]
        assert (numbers[0] == numbers[1]) == (case[3] == 2)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_only_the_syncs_cross_replicas_with_as_many_bytes_as_predicted(case: tuple[Any, ...]) -> None:
    for rank, found in enumerate(all_trained(2, 4, case[3])[case]):
        for step, one in enumerate(found["steps"], start=1):
            counted, ledger, predicted = one["bytes"]
            assert counted == ledger == predicted, f"rank {rank}, step {step}: {one['bytes']}, {one['callers']}"
            if case[3] == 2 or (step > 1 and step % 3):
                assert not one["callers"], f"rank {rank}, step {step}: {one['callers']}"
            elif step > 1:
                assert counted > 0


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_replicas_are_equal_after_a_sync_and_tied_copies_too(case: tuple[Any, ...]) -> None:
    ranks = all_trained(2, 4, case[3])[case]
    for step in (3, 6):
        one = [rank["steps"][step - 1] for rank in ranks]
        for kind in ("masters", "model"):
            assert same(one[0][kind], one[1][kind]) and same(one[2][kind], one[3][kind]), f"{kind}, step {step}"
    assert bool(ranks[0]["tied"]) == (case[0] != "untied")
    for step in range(1, 8):
        for first, last in ((ranks[0], ranks[2]), (ranks[1], ranks[3])):
            for name in first["tied"]:
                a, b = first["steps"][step - 1]["masters"][name], last["steps"][step - 1]["masters"][name]
                if case[3] == 1 or step % 3 == 0:
                    assert torch.equal(a, b), f"{name}, step {step}"
                else:  # the shards of the stages cut the matrix in different places
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_last_stage_of_an_uneven_pipeline_projects_nothing() -> None:
    found = all_trained(2, 4, 1)["uneven", 0, "fp32", 1]
    assert [rank["projected"] for rank in found] == [2, 2, 0, 0]


def with_the_users_optimizer() -> list[list[float]]:
    losses = []
    for own in (False, True):
        config, model = config_of(1), make_model("untied", 2)
        params = config["optimizer"]["params"]
        given = {"optimizer": lordo_ds.LoRDO(model.named_parameters(), **params)} if own else {}
        if own:
            del config["optimizer"]
        engine = make_engine(config, model, **given)
        hook = lordo_ds.hook(engine)
        assert hook is not None and hook.replicas == 2
        data = batches("untied", "fp32", hook.data_parallel_rank)
        losses.append([float(engine.train_batch(data)) for _ in range(5)])
        engine.destroy()
    return losses


def test_an_optimizer_that_the_user_built_trains_alike() -> None:
    for from_json, from_user in run_ranks(with_the_users_optimizer, 4):
        assert from_json == from_user


# -- tensor and pipeline parallelism together --------------------------------------------------------


def tensor_parallel(tensor: int, stages: int, stage: int, dtype: str) -> dict[str, Any]:
    """The norms, and the weights of this rank; every layer starts from the same values at every size."""
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    topology = PipeModelDataParallelTopology(num_pp=stages, num_mp=tensor, num_dp=1)
    # The layers are built inside PipelineModule and need the group before its grid is there.
    me = dist.get_rank()
    for ranks in topology.get_axis_comm_lists("model"):
        group = dist.new_group(ranks)
        if me in ranks:
            SlicedLinear.group = group
    engine = make_engine(config_of(stage, dtype), make_model("sliced", stages, topology))
    data, norms = batches("sliced", dtype, 0), []
    for _ in range(5):
        engine.train_batch(data)
        norms.append(float(engine.get_global_grad_norm()))
    found = {"norms": norms, "weights": model_weights(engine), "wrapper": type(engine.optimizer).__name__}
    engine.destroy()
    return found


MESH_CASES = [(0, "fp32"), (1, "fp32"), (0, "fp16"), (0, "bf16"), (1, "bf16")]


@once
def all_tensor_parallel(tensor: int, stages: int) -> Found[tuple[int, str]]:
    cases = {case: (tensor, stages, *case) for case in MESH_CASES}
    return run_cases(tensor_parallel, tensor * stages, cases, timeout_s=200)


@pytest.mark.parametrize(("tensor", "stages"), [(2, 2), (2, 1)])
@pytest.mark.parametrize("case", MESH_CASES, ids=ids)
def test_norms_and_weights_do_not_depend_on_tensor_and_pipeline_sizes(
    case: tuple[int, str], tensor: int, stages: int
) -> None:
    """DeepSpeed's own norm at stage 0 leaves out parts of the model on every mesh but the smallest."""
    (whole,), ranks = all_tensor_parallel(1, 1)[case], all_tensor_parallel(tensor, stages)[case]
    tolerance = 2e-5 if case[1] == "fp32" else 2e-3
    for rank, found in enumerate(ranks):
        assert found["norms"] == pytest.approx(whole["norms"], rel=10 * tolerance), f"rank {rank}"
        assert found["norms"] == ranks[0]["norms"]
        for name, weight in found["weights"].items():
            one = whole["weights"][name]
            part = one if weight.shape == one.shape else one.chunk(tensor)[rank % tensor]
            torch.testing.assert_close(weight.float(), part.float(), rtol=0, atol=tolerance)


# -- batch keys, data, evaluation --------------------------------------------------------------------

BATCH_KEYS: list[dict[str, int]] = [
    {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
    {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2},
    {"train_batch_size": 12, "gradient_accumulation_steps": 3},
    {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
    {"train_batch_size": 4},
]


def batch_meaning(replica_size: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    found = []
    for keys in BATCH_KEYS:
        pair = []
        for optimizer in (settings(optimizer={"replica_size": replica_size})["optimizer"], PLAIN):
            config = {"optimizer": optimizer, "steps_per_print": 10**9, **keys}
            given = copy.deepcopy(config)
            engine = make_engine(config, make_model("untied", 2))
            data = batches("untied", "fp32", 0)
            engine.train_batch(data)
            engine.train_batch(data)
            facts = {
                "accumulation": engine.gradient_accumulation_steps(),
                "micro_batches": engine.micro_batches,
                "micro": engine.train_micro_batch_size_per_gpu(),
                "train_batch_size": engine.train_batch_size(),
                "global_samples": engine.global_samples,
                "global_steps": engine.global_steps,
                "timers": [engine.tput_timer.batch_size, engine.batch_timer.batch_size],
                "config_untouched": config == given and engine.config is config,
            }
            engine.set_train_batch_size(24 * engine.train_micro_batch_size_per_gpu())
            facts["accumulation_of_24_micros"] = [engine.gradient_accumulation_steps(), engine.micro_batches]
            engine.set_train_micro_batch_size(5)
            facts["train_batch_size_of_5"] = engine.train_batch_size()
            pair.append(facts)
            engine.destroy()
            del engine
        found.append((pair[0], pair[1]))
    return found


@pytest.mark.parametrize("replica_size", [1, 2])
def test_batch_keys_mean_what_plain_deepspeeds_mean(replica_size: int) -> None:
    for found in run_ranks(batch_meaning, 4, replica_size):
        for keys, (ours, plain) in zip(BATCH_KEYS, found, strict=True):
            assert ours == plain, keys
            assert ours["config_untouched"]


class Numbers(torch.utils.data.Dataset[Any]):
    """Every sample is full of its own index."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((WIDTH,), float(index)), torch.zeros(WIDTH)


def samples_read(replica_size: int, training_data: bool) -> dict[str, Any]:
    load_in_this_process()
    config = config_of(0, optimizer={"replica_size": replica_size})
    given = {"training_data": Numbers()} if training_data else {}
    engine, _, loader, _ = deepspeed.initialize(model=make_model("untied", 2), config=config, **given)
    if not training_data:
        loader = engine.deepspeed_io(Numbers(), data_sampler=lordo_ds.data_sampler(Numbers(), engine, shuffle=False))
        engine.set_dataloader(loader)
    read: list[int] = []

    def remember(batch: Any) -> Any:
        if engine.is_first_stage():
            read.extend(int(value) for value in batch[0][:, 0])
        return batch

    engine.set_batch_fn(remember)
    engine.train_batch()
    engine.train_batch()
    return {"read": read, "loader": loader is not None, "stage": engine.stage_id}


@pytest.mark.parametrize("training_data", [True, False])
@pytest.mark.parametrize("replica_size", [1, 2])
def test_every_pipeline_of_every_replica_reads_its_own_samples(replica_size: int, training_data: bool) -> None:
    ranks = run_ranks(samples_read, 4, replica_size, training_data)
    assert all(rank["loader"] for rank in ranks)
    assert sorted(ranks[0]["read"] + ranks[1]["read"]) == list(range(16))
    assert not ranks[2]["read"] and ranks[2]["stage"] == 1


def evaluated() -> dict[str, Any]:
    """Losses of replicas that have drifted apart, on the same batches; and what DeepSpeed sends for them."""
    engine = make_engine(config_of(0), make_model("untied", 2))
    hook = lordo_ds.hook(engine)
    assert hook is not None
    data = batches("untied", "fp32", hook.data_parallel_rank)
    for _ in range(4):
        engine.train_batch(data)
    with CollectiveCounter() as counter:
        own = float(engine.eval_batch(batches("untied", "fp32", hook.data_parallel_rank)))
        common = float(engine.eval_batch(batches("untied", "fp32", 7)))
    crossing = counter.crossing(lambda rank: rank % 2)
    return {"own": own, "common": common, "crossing": [(r.op, r.payload_bytes) for r in crossing]}


def test_an_evaluation_reports_the_loss_of_its_replica() -> None:
    """DeepSpeed starts one with a barrier of all ranks: replicas must evaluate equally often. No loss crosses."""
    ranks = run_ranks(evaluated, 4)
    for kind in ("own", "common"):
        assert ranks[0][kind] == ranks[2][kind] != ranks[1][kind] == ranks[3][kind]
    assert all(set(rank["crossing"]) == {("barrier", 0)} for rank in ranks)


# -- skipped steps and loss scales -------------------------------------------------------------------


def overflowing(stage: int, dtype: str, replica_size: int) -> dict[str, Any]:
    """The last data-parallel rank meets an infinite input at steps 2 and 5; the second stage sees it first."""
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 50, "warmup_max_lr": 1e-2}}
    keys: dict[str, Any] = {"scheduler": schedule}
    if dtype == "fp16":
        keys["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
    engine = make_engine(config_of(stage, dtype, {"replica_size": replica_size}, **keys), make_model("untied", 2))
    hook = lordo_ds.hook(engine)
    assert hook is not None
    norms, skipped, scales = [], [], []
    data = batches("untied", dtype, hook.data_parallel_rank)
    for step in range(1, 8):
        micros = [next(data) for _ in range(ACCUMULATION)]
        if step in (2, 5) and hook.data_parallel_rank == 1:
            micros[0] = (micros[0][0], micros[0][1] * math.inf)
        engine.train_batch(iter(micros))
        norms.append(float(engine.get_global_grad_norm()))
        skipped.append(not engine.was_step_applied())
        scales.append(float(engine._get_optimizer_loss_scale() or 1.0))
    found = {
        "norms": norms,
        "skipped": skipped,
        "scales": scales,
        "lr": engine.get_lr()[0],
        "masters": weights(engine),
        "status": lordo_ds.status(engine),
    }
    engine.destroy()
    return found


OVERFLOW_CASES = [(0, "fp16", 1), (1, "fp16", 1), (0, "fp16", 2), (1, "fp16", 2), (0, "bf16", 1), (0, "bf16", 2)]


@once
def overflows() -> Found[tuple[int, str, int]]:
    return run_cases(overflowing, 4, {case: case for case in OVERFLOW_CASES}, timeout_s=200)


@pytest.mark.parametrize("case", OVERFLOW_CASES, ids=ids)
def test_all_ranks_of_a_replica_skip_the_same_steps(case: tuple[int, str, int]) -> None:
    ranks = overflows()[case]
    bad = [step in (2, 5) for step in range(1, 8)]
    for rank, found in enumerate(ranks):
        hit = case[2] == 2 or rank % 2 == 1
        assert found["skipped"] == (bad if hit else [False] * 7)
        assert found["norms"] == ranks[rank % 2]["norms"] and found["scales"] == ranks[rank % 2]["scales"]
        assert [math.isinf(norm) for norm in found["norms"]] == found["skipped"]
        assert found["lr"] == ranks[0]["lr"]
        assert all(bool(torch.isfinite(weight).all()) for weight in found["masters"].values())
        assert found["status"]["executed_steps"] == ranks[0]["status"]["executed_steps"]


def growing_scale(dtype: str, stage: int) -> list[float]:
    keys = {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 1}} if dtype == "fp16" else {}
    engine = make_engine(config_of(stage, dtype, **keys), make_model("untied", 2))
    data, norms = batches("untied", dtype, 0), []
    for _ in range(8):
        engine.train_batch(data)
        norms.append(float(engine.get_global_grad_norm()))
    scale = float(engine._get_optimizer_loss_scale() or 0.0)
    engine.destroy()
    return [*norms, scale]


@once
def growing_scales() -> Found[str]:
    return run_cases(growing_scale, 2, {"exact": ("fp32", 0), "stage 0": ("fp16", 0), "stage 1": ("fp16", 1)})


@pytest.mark.parametrize("stage", [0, 1])
def test_gradients_are_unscaled_by_the_scale_they_were_computed_with(stage: int) -> None:
    """At stage 0 DeepSpeed does not scale the loss of a pipeline, and divides by a scale that has just grown."""
    for found, exact in zip(growing_scales()[f"stage {stage}"], growing_scales()["exact"], strict=True):
        assert found[-1] > 32.0, "the loss scale grew"
        assert found[:-1] == pytest.approx(exact[:-1], rel=2e-2)


# -- checkpoints -------------------------------------------------------------------------------------

CHECKPOINT_CASES = [
    ("untied", 0, "fp32", 1),
    ("tied embedding", 0, "fp32", 2),
    ("tied embedding", 1, "fp32", 1),
    ("untied", 1, "bf16", 2),
    ("tied embedding", 0, "bf16", 1),
    ("tied embedding", 0, "bf16", 2),
    ("untied", 0, "fp16", 1),
]


def saved_and_resumed(folder: str, kind: str, stage: int, dtype: str, replica_size: int) -> dict[str, Any]:
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 20}}
    optimizer = {"replica_size": replica_size, "error_feedback": "fp32", "outer": {"momentum": 0.7}}
    config = config_of(stage, dtype, optimizer, scheduler=schedule)
    path = os.path.join(folder, ids((kind, stage, dtype, replica_size)))
    straight = make_engine(copy.deepcopy(config), make_model(kind, 2))
    hook = lordo_ds.hook(straight)
    assert hook is not None
    data, data_rank = batches(kind, dtype, hook.data_parallel_rank), hook.data_parallel_rank
    for step in range(1, 8):
        straight.train_batch(data)
        if step == 4:
            straight.save_checkpoint(path, client_state={"samples": 7})
            plain = os.path.join(path, f"plain_{data_rank}")
            straight.module.save_state_dict(plain, checkpoint_engine=straight.checkpoint_engine)
            at_save, masters_at_save = model_weights(straight), weights(straight)
    expected, sent, samples = weights(straight), lordo_ds.status(straight)["bytes_sent_total"], straight.global_samples
    straight.destroy()
    model = make_model(kind, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    resumed = make_engine(copy.deepcopy(config), model)
    _, client = resumed.load_checkpoint(path)
    facts = {"client": client["samples"], "loaded": same(model_weights(resumed), at_save)}
    facts["masters loaded"] = same(weights(resumed), masters_at_save)
    data = batches(kind, dtype, data_rank, first_step=5)
    for _ in range(5, 8):
        resumed.train_batch(data)
    facts |= {
        "bitwise": same(weights(resumed), expected),
        "bytes": lordo_ds.status(resumed)["bytes_sent_total"] == sent,
        "samples": resumed.global_samples == samples,
        "at_save": at_save,
    }
    resumed.destroy()
    return facts


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found[tuple[Any, ...]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    cases = {case: (str(folder), *case) for case in CHECKPOINT_CASES}
    return folder, run_cases(saved_and_resumed, 4, cases, timeout_s=280)


@pytest.mark.parametrize("case", CHECKPOINT_CASES, ids=ids)
def test_resuming_is_bitwise(checkpoints: Any, case: tuple[Any, ...]) -> None:
    for found in checkpoints[1][case]:
        facts = {name: value for name, value in found.items() if name != "at_save"}
        assert facts.pop("client") == 7
        assert all(facts.values()), facts


@pytest.mark.parametrize("case", CHECKPOINT_CASES, ids=ids)
def test_each_replica_has_the_files_of_all_its_stages(checkpoints: Any, case: tuple[Any, ...]) -> None:
    kind, stage, dtype, replica_size = case
    folder, _ = checkpoints[0] / ids(case), checkpoints[1][case]
    replicas = 2 // replica_size
    assert (folder / "latest").read_text() == "global_step4"
    found = sorted(p.name for p in (folder / "global_step4").glob("replica_*"))
    assert found == [f"replica_{m}" for m in range(replicas)]
    layers = [0, 1, 2, 3] if kind == "untied" else [0, 1, 2, 3, 4]
    expected = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(2)]
    if stage or dtype == "bf16":
        prefix = "bf16_zero" if dtype == "bf16" else "zero"
        shards = [(shard, rank) for shard in range(replica_size) for rank in range(2)]
        expected += [f"{prefix}_pp_rank_{shard}_mp_rank_{rank:02d}_optim_states.pt" for shard, rank in shards]
    expected += [f"layer_{index:02d}-model_states.pt" for index in layers]
    for replica in range(replicas):
        found = sorted(p.name for p in (folder / "global_step4" / f"replica_{replica}").iterdir())
        assert found == sorted(expected)


def test_saving_the_module_writes_the_first_replica_only(checkpoints: Any) -> None:
    case = ("untied", 0, "fp32", 1)
    folder = checkpoints[0] / ids(case)
    saved = torch.load(folder / "plain_0" / "layer_00-model_states.pt", weights_only=True)
    assert torch.equal(saved["weight"], checkpoints[1][case][0]["at_save"]["0.weight"])
    assert not (folder / "plain_1").exists()


def weights_only(folder: str, case: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    kind, stage, dtype, replica_size = case
    optimizer = {"replica_size": replica_size, "error_feedback": "fp32", "outer": {"momentum": 0.7}}
    engine = make_engine(config_of(stage, dtype, optimizer), make_model(kind, 2))
    engine.load_checkpoint(os.path.join(folder, ids(case)), **options)
    sync = lordo_ds.hook(engine).optimizer.sync  # type: ignore[union-attr]
    found = {
        "model": model_weights(engine),
        "masters": weights(engine),
        "anchored": all(torch.equal(item.state["anchor"], item.weight) for item in sync.items),
    }
    engine.destroy()
    return found


WEIGHTS_ONLY: dict[str, dict[str, Any]] = {
    "no states": {"load_optimizer_states": False},
    "the module only": {"load_module_only": True},
}
WEIGHTS_ONLY_CASES = [("tied embedding", 0, "bf16", 1), ("untied", 0, "fp16", 1)]


@pytest.fixture(scope="module")
def weights_loaded(checkpoints: Any) -> Found[tuple[Any, str]]:
    folder, saved = checkpoints
    cases = {
        (case, option): (str(folder), case, keys)
        for case in WEIGHTS_ONLY_CASES
        for option, keys in WEIGHTS_ONLY.items()
        if saved.ran(case)
    }
    return run_cases(weights_only, 4, cases)


@pytest.mark.parametrize("option", WEIGHTS_ONLY)
@pytest.mark.parametrize("case", WEIGHTS_ONLY_CASES, ids=ids)
def test_weights_without_states_are_a_new_start_for_all_replicas(
    checkpoints: Any, weights_loaded: Any, case: tuple[Any, ...], option: str
) -> None:
    """DeepSpeed forgets the full-precision weights of a bf16 pipeline at stage 0."""
    ranks = checkpoints[1][case]
    for rank, one in enumerate(weights_loaded[case, option]):
        saved = ranks[rank - rank % 2]["at_save"]
        assert one["anchored"] and same(one["model"], saved)
        for name, master in one["masters"].items():
            assert torch.equal(master.to(saved[name].dtype), saved[name]), name


# -- putting things back, refusals, failures ---------------------------------------------------------


def grid_facts(grid: PipelineParallelGrid) -> tuple[Any, ...]:
    group = dist.get_process_group_ranks(grid.get_data_parallel_group())
    return type(grid).__name__, grid.data_parallel_size, grid.data_parallel_id, list(grid.dp_group), group


def used_and_put_back() -> dict[str, Any]:
    model = make_model("tied embedding", 2)
    grid = model.mpu()
    before = grid_facts(grid)
    engine = make_engine(config_of(1), model)
    during = {"view": isinstance(model.mpu(), ReplicaGrid), "whole": grid_facts(grid), "ours": grid_facts(model.mpu())}
    beside = make_engine({**config_of(1), "optimizer": PLAIN}, make_model("untied", 2))
    beside_world = beside.dp_world_size
    beside.destroy()
    with pytest.raises(ConfigError, match="another LoRDO engine"):
        make_engine(config_of(1), model)
    engine.destroy()
    back = {
        "same grid": model.mpu() is grid,
        "facts": grid_facts(grid),
        "no patch left": "save_state_dict" not in vars(model),
        "global": not isinstance(deepspeed_groups.mpu, ReplicaGrid),
    }
    del engine
    plain = make_engine({**config_of(1), "optimizer": PLAIN}, make_model("untied", 2))
    plain_world = plain.dp_world_size
    wrapped = PipelineEngine.__init__
    registration.unregister()
    original = PipelineEngine.__init__
    registration.register()
    return {
        "before": before, "during": during, "back": back, "plain_world": plain_world, "beside": beside_world,
        "unregistered": original is wrapped.__wrapped__, "again": PipelineEngine.__init__ is not original,
    }  # fmt: skip


def test_destroying_the_engine_gives_the_module_its_grid_back() -> None:
    for rank, found in enumerate(run_ranks(used_and_put_back, 4)):
        data_ranks = [0, 1] if rank < 2 else [2, 3]
        whole = ("PipelineParallelGrid", 2, rank % 2, data_ranks, data_ranks)
        assert found["before"] == found["during"]["whole"] == found["back"]["facts"] == whole
        assert found["during"]["view"] and found["during"]["ours"] == ("ReplicaGrid", 1, 0, [rank], [rank])
        assert all(found["back"].values())
        assert found["plain_world"] == found["beside"] == 2
        assert found["unregistered"] and found["again"]


class WithPositions(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.positions


def half_tied() -> PipelineModule:
    embedding = functools.partial(TiedLayerSpec, "embedding", WithPositions)
    layers = [embedding(), LayerSpec(nn.Linear, WIDTH, WIDTH), LayerSpec(nn.Tanh), embedding(forward_fn=logits)]
    return PipelineModule(layers=layers, num_stages=2, loss_fn=cross_entropy, partition_method="uniform")


def two_way() -> PipelineModule:
    layers = [LayerSpec(nn.Linear, WIDTH, WIDTH) for _ in range(4)]
    return DualPipeVModule(layers=layers, num_stages=2, loss_fn=squared_error, partition_method="uniform")


def two_groups(model: PipelineModule) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    if model.stage_id == 1:
        return [{"params": parameters}]
    return [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]


untied = functools.partial(make_model, "untied", 2)
tied = functools.partial(make_model, "tied embedding", 2)
FP32_GRADS = {"data_types": {"grad_accum_dtype": "fp32"}}
# the model, the configuration, its parameter groups, and a part of the message
REFUSED: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "stage 2": (untied, config_of(2), None, "use stage 0 or 1"),
    "two-way": (two_way, config_of(0), None, "DualPipeVModule"),
    "half tied": (half_tied, config_of(0), None, "positions of the TiedLayerSpec 'embedding'"),
    "other accumulation": (tied, config_of(1, "fp16", **FP32_GRADS), None, "grad_accum_dtype"),
    "group counts": (untied, config_of(1), two_groups, "[1, 2] parameter groups"),
    "replica size": (untied, config_of(0, optimizer={"replica_size": 3}), None, "must divide the data-parallel size 2"),
}


def refused(case: str) -> tuple[str, bool]:
    """What was said, and whether the module has its own grid again."""
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    make, config, parameters, _ = REFUSED[case]
    model = make()
    grid = model.mpu()
    given = {"model_parameters": parameters(model)} if parameters else {}
    with pytest.raises(ConfigError) as caught:
        make_engine(config, model, **given)
    put_back = model.mpu() is grid and not isinstance(deepspeed_groups.mpu, ReplicaGrid)
    return str(caught.value), put_back


@once
def all_refused() -> Found[str]:
    return run_cases(refused, 4, {case: (case,) for case in REFUSED})


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_train_wrongly_is_refused_on_every_rank(case: str) -> None:
    for message, put_back in all_refused()[case]:
        assert REFUSED[case][3] in message and "\n" not in message
        assert put_back


def uneven_for_long() -> tuple[int, int]:
    engine = make_engine(config_of(0, optimizer={"sync_interval": 4}), make_model("uneven", 2))
    hook = lordo_ds.hook(engine)
    assert hook is not None
    data = batches("uneven", "fp32", hook.data_parallel_rank)
    for _ in range(20):
        engine.train_batch(data)
    hook.finish()
    return engine.global_steps, lordo_ds.status(engine)["syncs"]


def test_uneven_stages_with_tied_embeddings_stay_in_step() -> None:
    assert run_ranks(uneven_for_long, 4, timeout_s=100) == [(20, 5)] * 4


class CrashError(RuntimeError):
    pass


def crashing() -> None:
    engine = make_engine(config_of(0), make_model("untied", 2))
    data = batches("untied", "fp32", dist.get_rank() % 2)
    for step in range(1, 5):
        if step == 3 and dist.get_rank() == 3:

            def crash(*_: Any) -> None:
                raise CrashError("in the loss of step 3")

            engine.module.loss_fn = crash
        engine.train_batch(data)


def test_a_stage_that_crashes_ends_the_job_with_its_traceback() -> None:
    with pytest.raises(RankFailedError) as caught:
        run_ranks(crashing, 4, timeout_s=60)
    assert caught.value.rank == 3 and caught.value.error_type == "CrashError" and not caught.value.timed_out
    assert "in the loss of step 3" in str(caught.value) and "def crash" not in str(caught.value).split("Crash")[0]
