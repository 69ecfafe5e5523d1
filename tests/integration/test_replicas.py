"""Replicas of several ranks: 2 replicas x 2 shards at every ZeRO stage."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import utils as zero_utils
from torch import Tensor, nn

import lordo_ds
from lordo_ds import CheckpointError, ConfigError
from lordo_ds.adapters.deepspeed.global_mpu import lent
from lordo_ds.adapters.deepspeed.zero_init import zero_init_group
from tests import problems
from tests.cases import Found, once, run_cases
from tests.collectives import CollectiveCounter
from tests.engines import GivenGradients, make_engine, settings, train_step, weights
from tests.ranks import RankFailedError, run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]

STAGES = (0, 1, 2, 3)
PLAIN = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    """The keys of a stage; at stage 3 the biases persist and sub-groups hold a few parameters each."""
    small = {"stage3_param_persistence_threshold": 10, "sub_group_size": 60} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **small, **keys}}


def config_of(stage: int, dtype: str = "fp32", optimizer: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return settings(dtype, {"replica_size": 2, **(optimizer or {})}, **zero(stage), **keys)


@once
def of_all_stages(function: Callable[..., Any], *args: Any) -> Found[int]:
    """What a function returns at every stage, by rank; all stages in one launch of 4 ranks."""
    return run_cases(function, 4, {stage: (stage, *args) for stage in STAGES}, timeout_s=240)


def model_weights(engine: Any) -> dict[str, Tensor]:
    """Copies of what the model computes with, whole, in its own precision."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- who is equal to whom, and what crosses ----------------------------------------------------------


def trained(stage: int, dtype: str) -> dict[str, Any]:
    """Per step: the masters, the model's weights, and where crossing collectives were called from."""
    with CollectiveCounter() as counter:
        engine = make_engine(config_of(stage, dtype))
        steps, crossing = [], []
        for step in range(1, 8):
            counter.phase(f"step {step}")
            train_step(engine, step)
            counter.phase("reading")
            steps.append((weights(engine), model_weights(engine)))
            records = counter.crossing(lambda rank: rank // 2, phase=f"step {step}")
            crossing.append([record.where for record in records])
    facts = {
        "steps": steps,
        "crossing": crossing,
        "inside": len(counter.select(phase="step 5")),
        "status": lordo_ds.status(engine),
        "dp_world_size": engine.dp_world_size,
        "wrapper": type(engine.optimizer).__name__,
    }
    engine.destroy()
    return facts


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_of_a_replica_are_equal_and_replicas_differ_between_syncs(stage: int, dtype: str) -> None:
    first, second, third, fourth = of_all_stages(trained, dtype)[stage]
    for step in range(1, 8):
        (a, a_low), (b, b_low), (c, c_low), (d, d_low) = (f["steps"][step - 1] for f in (first, second, third, fourth))
        assert same(a, b) and same(c, d) and same(a_low, b_low) and same(c_low, d_low), f"step {step}"
        assert same(a, c) == same(a_low, c_low) == (step % 3 == 0), f"step {step}"
        for name, weight in a.items():
            assert torch.equal(weight.to(a_low[name].dtype), a_low[name]), f"step {step}, {name}"
    assert first["status"]["replicas"] == 2 and first["status"]["shard_size"] == 2
    assert first["dp_world_size"] == 2
    others = first["status"]["other_methods_bytes_per_step"]
    assert others["adamw_ddp"] == first["status"]["ddp_bytes_per_step"] == 3 * others["diloco"]
    assert first["status"]["other_methods_dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert 0 < others["low_rank_ddp"] < others["adamw_ddp"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_only_the_sync_crosses_replicas(stage: int, dtype: str) -> None:
    """At stage 3 the first steps include DeepSpeed's check that all ranks run the same modules."""
    for found in of_all_stages(trained, dtype)[stage]:
        assert found["inside"] > 0
        for step, callers in enumerate(found["crossing"], start=1):
            # Step 1 ends in the first basis; the sync interval is 3.
            assert bool(callers) == (step == 1 or step % 3 == 0), f"step {step}: {callers}"
            assert all("/lordo_ds/comm/" in caller for caller in callers), f"step {step}: {callers}"


def held_back(stage: int, dtype: str, latency_ms: float) -> dict[str, Any]:
    """Three steps with a slow link between the replicas; what it must have taken, by the messages that crossed."""
    link = {"mbit_per_s": 1e4, "latency_ms": latency_ms}
    engine = make_engine(config_of(stage, dtype, {"wire_throttle": link}))
    before = lordo_ds.status(engine)["seconds_blocked_total"]
    with CollectiveCounter() as counter:
        for step in range(1, 4):
            train_step(engine, step)
    messages = [record.op for record in counter.crossing(lambda rank: rank // 2)]
    hops = {"all_reduce": 2, "all_gather_into_tensor": 1}  # between two replicas
    facts = {
        "weights": weights(engine),
        "messages": len(messages),
        "least_s": sum(hops.get(op, 0) for op in messages) * latency_ms / 1e3,
        "blocked_s": lordo_ds.status(engine)["seconds_blocked_total"] - before,
    }
    engine.destroy()
    return facts


@pytest.mark.parametrize("stage", STAGES)
def test_a_wire_throttle_holds_back_every_stage_and_changes_nothing_else(stage: int) -> None:
    free = of_all_stages(trained, "fp32")[stage]
    for before, held in zip(free, of_all_stages(held_back, "fp32", 5.0)[stage], strict=True):
        assert held["blocked_s"] >= held["least_s"] > 0.05
        assert held["messages"] == sum(map(len, before["crossing"][:3]))
        assert same(held["weights"], before["steps"][2][0])


def plain_average(stage: int, dtype: str) -> dict[str, Tensor]:
    """One replica of all ranks, nothing projected."""
    optimizer = {"replica_size": "all", "low_rank": {"exclude": [".*"]}}
    engine = make_engine(config_of(stage, dtype, optimizer))
    for step in range(1, 6):
        train_step(engine, step)
    found = weights(engine)
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_one_replica_of_all_ranks_averages_over_all(stage: int) -> None:
    found = of_all_stages(plain_average, "fp32")
    assert all(same(found[stage][0], other) for other in found[stage])
    for name, weight in found[0][0].items():
        torch.testing.assert_close(found[stage][0][name], weight, rtol=0, atol=1e-6)


# -- starting equal ----------------------------------------------------------------------------------


class WithFrozenAndBuffers(GivenGradients):
    """Other values on every rank; `small` and `frozen_small` persist at stage 3, `frozen` does not."""

    def __init__(self, seed: int) -> None:
        super().__init__(scale=1.0 + seed)
        self.frozen = nn.Parameter(torch.full((4, 7), float(seed)), requires_grad=False)
        self.frozen_small = nn.Parameter(torch.full((3,), float(seed)), requires_grad=False)
        self.register_buffer("table", torch.full((4, 2), float(seed)).T)
        self.register_buffer("flags", torch.tensor([seed % 2 == 1, True]))
        self.register_buffer("count", torch.tensor(seed))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        terms = [(p.float() * gradients[n].float()).sum() for n, p in self.named_parameters() if n in gradients]
        return sum(terms)  # type: ignore[return-value]


def started(stage: int, dtype: str) -> dict[str, Any]:
    engine = make_engine(config_of(stage, dtype), WithFrozenAndBuffers(seed=dist.get_rank() + 1))
    train_step(engine, 1, spoil=0.0)
    found = {
        "model": model_weights(engine),
        "buffers": {name: buffer.clone() for name, buffer in engine.module.named_buffers()},
    }
    engine.destroy()
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_replicas_start_with_the_weights_of_the_first(stage: int, dtype: str) -> None:
    """DeepSpeed equalises the parameters of a replica, not its buffers: those follow the same shard of the first."""
    ranks = of_all_stages(started, dtype)[stage]
    for rank in ranks[1:]:
        assert same(ranks[0]["model"], rank["model"])
    assert float(ranks[3]["model"]["frozen"][0, 0]) == 1.0 and float(ranks[3]["model"]["frozen_small"][0]) == 1.0
    assert same(ranks[0]["buffers"], ranks[2]["buffers"]) and same(ranks[1]["buffers"], ranks[3]["buffers"])
    assert int(ranks[2]["buffers"]["count"]) == 1 and ranks[2]["buffers"]["table"].shape == (2, 4)


# -- batch keys and data -----------------------------------------------------------------------------

BATCH_KEYS: list[dict[str, int]] = [
    {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
    {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2},
    {"train_batch_size": 24, "gradient_accumulation_steps": 3},
    {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
    {"train_batch_size": 8},
]


def batch_meaning(stage: int) -> list[list[dict[str, Any]]]:
    found = []
    for keys in BATCH_KEYS:
        pair = []
        for kind in ("LoRDO", "AdamW"):
            config = {**config_of(stage), **keys}
            if "train_micro_batch_size_per_gpu" not in keys:
                del config["train_micro_batch_size_per_gpu"]
            if kind == "AdamW":
                config["optimizer"] = PLAIN
            given = copy.deepcopy(config)
            engine = make_engine(config)
            for micro_step in range(2 * engine.gradient_accumulation_steps()):
                train_step(engine, micro_step)
            facts = {
                "accumulation": engine.gradient_accumulation_steps(),
                "micro": engine.train_micro_batch_size_per_gpu(),
                "train_batch_size": engine.train_batch_size(),
                "global_samples": engine.global_samples,
                "global_steps": engine.global_steps,
                "timer": engine.tput_timer.batch_size,
                "config_untouched": config == given and engine.config is config,
            }
            engine.set_train_batch_size(32)
            facts["accumulation_of_32"] = engine.gradient_accumulation_steps()
            engine.set_train_micro_batch_size(5)
            facts["train_batch_size_of_5"] = engine.train_batch_size()
            pair.append(facts)
            engine.destroy()
            del engine
        found.append(pair)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_batch_keys_mean_what_plain_deepspeeds_mean(stage: int) -> None:
    for found in of_all_stages(batch_meaning)[stage]:
        for keys, (ours, plain) in zip(BATCH_KEYS, found, strict=True):
            assert ours == plain, keys
            assert ours["config_untouched"]


class Numbers(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def samples_seen(stage: int) -> list[list[int]]:
    config = {**config_of(stage), "train_micro_batch_size_per_gpu": 2}
    engine, _, loader, _ = deepspeed.initialize(model=GivenGradients(), config=config, training_data=Numbers())
    evaluation = engine.deepspeed_io(Numbers(), route="eval")
    assert loader.batch_size == evaluation.batch_size == 2
    # Iterating the loaders would start DeepSpeed's worker processes, two per rank.
    samplers = (loader.data_sampler, evaluation.data_sampler, lordo_ds.data_sampler(Numbers(), engine))
    engine.destroy()
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_of_every_replica_reads_its_own_samples(stage: int) -> None:
    for lists in zip(*of_all_stages(samples_seen)[stage], strict=True):
        assert sorted(i for one in lists for i in one) == list(range(32))


def recorded_rows(stage: int) -> list[list[dict[str, float]]]:
    engine = make_engine(config_of(stage))
    hook = lordo_ds.hook(engine)
    assert hook is not None
    batches = []
    for step in range(1, 6):
        train_step(engine, step)
        hook.record(loss=step + 10.0 * dist.get_rank(), grad_norm=2.0)
        batches.append(hook.averaged_rows())
    hook.finish()
    batches.append(hook.averaged_rows())
    engine.destroy()
    return batches


@pytest.mark.parametrize("stage", STAGES)
def test_recorded_numbers_are_averaged_over_all_ranks_of_all_replicas(stage: int) -> None:
    for found in of_all_stages(recorded_rows)[stage]:
        losses = [[row["loss"] for row in rows] for rows in found]
        assert losses == [[], [], [16.0, 17.0], [], [], [18.0, 19.0, 20.0]]


# -- skipped steps and loss scales -------------------------------------------------------------------


def overflowing(stage: int) -> dict[str, Any]:
    """fp16; one rank of the second replica overflows at steps 1, 4 and 6."""
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 50, "warmup_max_lr": 1e-2}}
    engine = make_engine(config_of(stage, "fp16", scheduler=schedule))
    train_norms = []
    for step in range(1, 10):
        bad = dist.get_rank() == 3 and step in (1, 4, 6)
        train_step(engine, step, spoil=math.inf if bad else None)
        train_norms.append(float(engine.get_global_grad_norm()))
    facts = {
        "skipped": engine.skipped_steps,
        "steps": engine.global_steps,
        "lr": engine.get_lr()[0],
        "status": lordo_ds.status(engine),
        "weights": weights(engine),
        "model": model_weights(engine),
        "norms": train_norms,
    }
    engine.destroy()
    return facts


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_on_one_rank_skips_its_replica_and_keeps_the_replicas_in_step(stage: int) -> None:
    ranks = of_all_stages(overflowing)[stage]
    assert [rank["skipped"] for rank in ranks] == [0, 0, 3, 3]
    for rank in ranks:
        assert rank["steps"] == 9 and rank["status"]["syncs"] == 3 and rank["status"]["executed_steps"] == 9
        assert rank["lr"] == ranks[0]["lr"]
        assert same(rank["weights"], ranks[0]["weights"]) and same(rank["model"], ranks[0]["model"])
        assert all(torch.isfinite(weight).all() for weight in rank["weights"].values())


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_gradients_are_unscaled_exactly_once(stage: int) -> None:
    for rank, found in enumerate(of_all_stages(overflowing)[stage]):
        for step, norm in enumerate(found["norms"], start=1):
            if rank > 1 and step in (1, 4, 6):
                assert math.isinf(norm)
                continue
            pair = [problems.gradients(step, r, torch.float32) for r in ((0, 1) if rank < 2 else (2, 3))]
            mean = torch.cat([torch.stack([g[name] for g in pair]).mean(0).flatten() for name in pair[0]])
            assert norm == pytest.approx(float(mean.norm()), rel=2e-3), f"step {step}"


# -- checkpoints -------------------------------------------------------------------------------------


def saved_and_resumed(stage: int, folder: str, dtype: str) -> dict[str, Any]:
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 20}}
    config = config_of(stage, dtype, {"error_feedback": "fp32", "outer": {"momentum": 0.7}}, scheduler=schedule)
    path = os.path.join(folder, f"{dtype}_{stage}")
    straight = make_engine(copy.deepcopy(config))
    for step in range(1, 9):
        train_step(straight, step)
        if step == 4:
            straight.save_checkpoint(path, client_state={"samples": 7})
            at_save = weights(straight)
    expected, sent = weights(straight), lordo_ds.status(straight)["bytes_sent_total"]
    straight.destroy()
    resumed = make_engine(copy.deepcopy(config), GivenGradients(scale=3.0))
    _, client = resumed.load_checkpoint(path)
    assert client["samples"] == 7
    for step in range(5, 9):
        train_step(resumed, step)
    facts = {
        "bitwise": same(weights(resumed), expected),
        "bytes_equal": lordo_ds.status(resumed)["bytes_sent_total"] == sent,
        "at_save": at_save,
    }
    resumed.destroy()
    return facts


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_resuming_is_bitwise(checkpoints: Path, stage: int, dtype: str) -> None:
    for found in of_all_stages(saved_and_resumed, str(checkpoints), dtype)[stage]:
        assert found["bitwise"] and found["bytes_equal"]


@pytest.mark.parametrize("stage", STAGES)
def test_each_replica_has_its_own_files_under_one_tag(checkpoints: Path, stage: int) -> None:
    assert of_all_stages(saved_and_resumed, str(checkpoints), "bf16")[stage]
    folder = checkpoints / f"bf16_{stage}"
    assert (folder / "latest").read_text() == "global_step4"
    assert sorted(p.name for p in (folder / "global_step4").glob("replica_*")) == ["replica_0", "replica_1"]
    model = (
        [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(2)]
        if stage == 3
        else ["mp_rank_00_model_states.pt"]
    )
    states = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)] if stage else []
    for replica in range(2):
        found = sorted(p.name for p in (folder / "global_step4" / f"replica_{replica}").iterdir())
        assert found == sorted(model + states)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_script_makes_plain_weights_of_a_replica(checkpoints: Path, stage: int) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    ranks = of_all_stages(saved_and_resumed, str(checkpoints), "fp32")[stage]
    folder = checkpoints / f"fp32_{stage}"
    for replica in range(2):
        found = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=f"global_step4/replica_{replica}")
        assert same({name: weight.clone() for name, weight in found.items()}, ranks[2 * replica]["at_save"])


RESUMED_WITH: dict[str, dict[str, Any]] = {
    "stage 1, fp32 accumulation": {**zero(1), "data_types": {"grad_accum_dtype": "fp32"}},
    "stage 2, round robin, aligned": zero(2, round_robin_gradients=True, parameter_alignment=True),
    "stage 2, offloaded": zero(2, offload_optimizer={"device": "cpu", "pin_memory": False}),
    "stage 3, offloaded": zero(3, offload_optimizer={"device": "cpu", "pin_memory": False}),
}


def resumed_with_option(folder: str, option: str) -> bool:
    config = settings("bf16", {"replica_size": 2}, **RESUMED_WITH[option])
    straight = make_engine(copy.deepcopy(config))
    for step in range(1, 7):
        train_step(straight, step)
        if step == 4:
            straight.save_checkpoint(os.path.join(folder, option))
    expected = weights(straight)
    straight.destroy()
    resumed = make_engine(copy.deepcopy(config), GivenGradients(scale=3.0))
    resumed.load_checkpoint(os.path.join(folder, option))
    for step in range(5, 7):
        train_step(resumed, step)
    found = same(weights(resumed), expected)
    resumed.destroy()
    return found


@pytest.fixture(scope="module")
def resumed_with_options(tmp_path_factory: pytest.TempPathFactory) -> Found[str]:
    folder = str(tmp_path_factory.mktemp("options"))
    return run_cases(resumed_with_option, 4, {option: (folder, option) for option in RESUMED_WITH}, timeout_s=240)


@pytest.mark.parametrize("option", RESUMED_WITH)
def test_resuming_is_bitwise_with_the_options_of_the_stages(resumed_with_options: Found[str], option: str) -> None:
    assert resumed_with_options[option] == [True] * 4


def weights_only(stage: int, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Load the weights that bf16 training saved at step 4, where the replicas differ, and train on."""
    engine = make_engine(config_of(stage, "bf16"), GivenGradients(scale=3.0))
    engine.load_checkpoint(os.path.join(folder, f"bf16_{stage}"), **options)
    facts = {"model": model_weights(engine), "masters": weights(engine)}
    sync = lordo_ds.hook(engine).optimizer.sync  # type: ignore[union-attr]
    facts["anchored"] = all(torch.equal(item.state["anchor"], item.weight) for item in sync.items)
    for step in range(5, 9):
        train_step(engine, step)
    facts["end"] = weights(engine)
    engine.destroy()
    return facts


@pytest.mark.parametrize("options", [{"load_optimizer_states": False}, {"load_module_only": True}], ids=str)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_without_states_are_a_new_start_for_all_replicas(
    checkpoints: Path, stage: int, options: dict[str, bool]
) -> None:
    saved = of_all_stages(saved_and_resumed, str(checkpoints), "bf16")[stage]
    ranks = run_ranks(weights_only, 4, stage, str(checkpoints), options)
    for found in ranks:
        assert found["anchored"] and same(found["model"], ranks[0]["model"])
        for name, master in found["masters"].items():
            # DeepSpeed restores the masters from the model's copy, or with their own precision.
            assert torch.equal(master.bfloat16(), saved[0]["at_save"][name].bfloat16())
            assert torch.equal(master.bfloat16(), found["model"][name])
            assert float((found["end"][name] - master).abs().max()) < 0.1, "the old weights came back"


def resumed_with(folder: str, stage: int, replica_size: int | str, options: dict[str, Any]) -> str:
    engine = make_engine(config_of(stage, "fp32", {"replica_size": replica_size}))
    with pytest.raises(ValueError) as caught:
        engine.load_checkpoint(folder, **options)
    return str(caught.value)


def test_another_number_of_replicas_is_refused_on_resume(checkpoints: Path) -> None:
    assert of_all_stages(saved_and_resumed, str(checkpoints), "fp32")[2]
    for message in run_ranks(resumed_with, 4, str(checkpoints / "fp32_2"), 2, "all", {}):
        assert "holds the replicas [0, 1], this run has 1: resume with as many ranks" in message


def weights_of_another_layout(folder: str) -> tuple[str, bool]:
    """Two sub-groups of parameters where one was saved."""
    engine = make_engine(settings("fp32", {"replica_size": 2}, **zero(3, sub_group_size=300)))
    before = weights(engine)
    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder, load_optimizer_states=False)
    return str(caught.value), same(before, weights(engine))


def test_weights_of_shards_that_were_cut_otherwise_are_refused(checkpoints: Path) -> None:
    assert of_all_stages(saved_and_resumed, str(checkpoints), "fp32")[3]
    for message, unchanged in run_ranks(weights_of_another_layout, 4, str(checkpoints / "fp32_3")):
        assert "holds other parameters, or cut into other shards" in message and unchanged


def plain_model_saved(folder: str) -> tuple[dict[str, Tensor], bool]:
    engine = make_engine(
        settings("bf16", {"replica_size": 2}, **zero(3, stage3_gather_16bit_weights_on_model_save=True))
    )
    for step in range(1, 5):
        train_step(engine, step)
    return model_weights(engine), engine.save_16bit_model(folder)


def test_save_16bit_model_writes_the_first_replica(tmp_path: Path) -> None:
    ranks = run_ranks(plain_model_saved, 4, str(tmp_path))
    assert same(torch.load(tmp_path / "pytorch_model.bin"), ranks[0][0])
    assert all(saved for _, saved in ranks) and not same(ranks[0][0], ranks[2][0])


# -- options of the stages ---------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "stage 1 offloaded": zero(1, offload_optimizer={"device": "cpu", "pin_memory": False}),
    "stage 2 round robin, aligned": zero(2, round_robin_gradients=True, parameter_alignment=True),
    "stage 2 overlapped": zero(2, overlap_comm=True, reduce_bucket_size=100),
    "stage 3 offloaded": zero(3, offload_optimizer={"device": "cpu", "pin_memory": False}),
    "stage 3 one sub-group": {"zero_optimization": {"stage": 3}},
    "stage 1 fp32 accumulation": {**zero(1), "data_types": {"grad_accum_dtype": "fp32"}},
}


def trained_with_option(keys: dict[str, Any]) -> dict[str, Tensor]:
    engine = make_engine(settings("bf16", {"replica_size": 2}, **keys))
    for step in range(1, 8):
        train_step(engine, step)
    found = weights(engine)
    engine.destroy()
    return found


@once
def trained_with_options() -> Found[str]:
    cases = {option: (keys,) for option, keys in {"stage 1": zero(1), **OPTIONS}.items()}
    return run_cases(trained_with_option, 4, cases, timeout_s=240)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_stages_do_not_change_the_trajectory(option: str) -> None:
    """bf16 gradients are summed in another order or precision: a few of them round the other way."""
    ranks = trained_with_options()[option]
    for found, expected in zip(ranks, trained_with_options()["stage 1"], strict=True):
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=3e-3, msg=name)
    assert same(ranks[0], ranks[1])


def offload_states_later() -> str:
    engine = make_engine(config_of(1))
    with pytest.raises(ValueError) as caught:
        engine.offload_states()
    return str(caught.value)


def test_offloading_between_steps_is_refused() -> None:
    assert "offload_states() is not supported" in run_ranks(offload_states_later, 2)[0]


# -- replica_size and mpu ----------------------------------------------------------------------------


def replica_of(replica_size: int | str, ranks_per_node: list[int]) -> list[int]:
    rank = dist.get_rank()
    first, node = 0, 0
    while rank >= first + ranks_per_node[node]:
        first, node = first + ranks_per_node[node], node + 1
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = str(ranks_per_node[node]), str(rank - first)
    engine = make_engine(settings(optimizer={"replica_size": replica_size}, **zero(1)))
    return dist.get_process_group_ranks(engine.data_parallel_group)


@pytest.mark.parametrize(
    ("replica_size", "ranks_per_node", "replicas"),
    [
        ("node", [2, 2], [[0, 1], [0, 1], [2, 3], [2, 3]]),
        ("node", [4], [[0, 1, 2, 3]] * 4),
        ("all", [2, 2], [[0, 1, 2, 3]] * 4),
        (2, [4], [[0, 1], [0, 1], [2, 3], [2, 3]]),
        (1, [2, 2], [[0], [1], [2], [3]]),
    ],
)
def test_replica_size_cuts_the_ranks(
    replica_size: int | str, ranks_per_node: list[int], replicas: list[list[int]]
) -> None:
    assert run_ranks(replica_of, 4, replica_size, ranks_per_node) == replicas


def node_without_an_engine(stated: dict[str, int]) -> Any:
    """Which replica the ranks of a plain optimizer and of Megatron's loop belong to, or how they are refused."""
    from megatron_patches.ddp import replicas
    from tests.gpts import start_megatron

    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update({name: str(value) for name, value in stated.items()})
    start_megatron()
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = lordo_ds.LoRDO([("a.weight", weight)], rank=2, replica_size="node")
    weight.grad = torch.ones(4, 4)
    try:
        optimizer.step()
    except ConfigError as error:
        with pytest.raises(ConfigError, match="needs LOCAL_WORLD_SIZE"), replicas("node"):
            pass
        return str(error)
    assert optimizer.sync is not None
    with replicas("node") as mine:
        return dist.get_process_group_ranks(mine.groups.shard), optimizer.sync.wire.size, optimizer.sync.wire.twins.size


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_nodes_are_found_without_an_engine_too(name: str) -> None:
    assert run_ranks(node_without_an_engine, 4, {name: 2}) == [([0, 1], 2, 2)] * 2 + [([2, 3], 2, 2)] * 2


def test_nodes_that_nobody_states_are_refused_without_an_engine_too() -> None:
    """All ranks would have been taken for one node, which never syncs."""
    assert all("needs LOCAL_WORLD_SIZE" in found for found in run_ranks(node_without_an_engine, 2, {}))


def test_unequal_nodes_are_refused() -> None:
    with pytest.raises(RankFailedError, match="equally many consecutive ranks on every node, found") as caught:
        run_ranks(replica_of, 3, "node", [2, 1])
    assert caught.value.error_type == ConfigError.__name__


def test_a_size_that_does_not_divide_is_refused_with_the_nearest() -> None:
    with pytest.raises(RankFailedError, match=r"replica_size = 3 must divide the data-parallel size 4 \(nearest: 2\)"):
        run_ranks(replica_of, 4, 3, [4])


class UsersMPU:
    """What a Megatron script passes; `parallel` is its tensor-parallel size."""

    def __init__(self, parallel: int = 1) -> None:
        world, me = dist.get_world_size(), dist.get_rank()
        rows = [list(range(start, start + parallel)) for start in range(0, world, parallel)]
        columns = [list(range(start, world, parallel)) for start in range(parallel)]
        made = [(ranks, dist.new_group(ranks)) for ranks in rows + columns]
        self.tensor = next(group for ranks, group in made[: len(rows)] if me in ranks)
        self.data = next(group for ranks, group in made[len(rows) :] if me in ranks)
        self.asked: list[str] = []

    def get_data_parallel_group(self) -> Any:
        return self.data

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data)

    def get_sequence_data_parallel_group(self) -> Any:
        return self.data

    def get_model_parallel_group(self) -> Any:
        self.asked.append("group")
        return self.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.tensor)

    def get_tensor_model_parallel_rank(self) -> int:
        self.asked.append("rank")
        return dist.get_rank(self.tensor)


def with_users_mpu(stage: int) -> dict[str, Any]:
    mpu = UsersMPU()
    engine = make_engine(config_of(stage), mpu=mpu)
    for step in range(1, 5):
        train_step(engine, step)
    facts = {
        "weights": weights(engine),
        "asked": sorted(set(mpu.asked)),
        "replica": dist.get_process_group_ranks(engine.data_parallel_group),
        "train_batch_size": engine.train_batch_size(),
        "wrapped": engine.mpu.wrapped is mpu and not hasattr(engine.mpu, "get_sequence_data_parallel_group"),
    }
    engine.destroy()
    return facts


@pytest.mark.parametrize("stage", STAGES)
def test_a_users_mpu_is_wrapped_and_asked_about_model_parallelism(stage: int) -> None:
    without = of_all_stages(trained, "fp32")[stage]
    for rank, found in enumerate(of_all_stages(with_users_mpu)[stage]):
        assert found["replica"] == ([0, 1] if rank < 2 else [2, 3])
        assert found["train_batch_size"] == 4 and found["wrapped"]
        assert stage == 0 or "group" in found["asked"]
        assert same(found["weights"], without[rank]["steps"][3][0])


class SequenceParallelMPU:
    """What `deepspeed.runtime.sequence_parallel` hands out: no data-parallel group."""

    initialize_sequence_parallel = None

    def get_sequence_parallel_world_size(self) -> int:
        return 2


def sequence_parallel() -> None:
    make_engine(config_of(1), mpu=SequenceParallelMPU())


def test_ulysses_is_refused() -> None:
    with pytest.raises(RankFailedError, match="do not make up all ranks is not supported"):
        run_ranks(sequence_parallel, 2)


def tensor_parallel(stage: int) -> dict[str, Any]:
    """4 ranks, 2 of them tensor-parallel; no parameter is cut, so both must see the same gradients."""
    engine = make_engine(settings(**zero(stage)), mpu=UsersMPU(parallel=2))
    for step in range(1, 5):
        train_step(engine, step, dp_rank=dist.get_rank() // 2)
    hook = lordo_ds.hook(engine)
    assert hook is not None
    facts = {
        "weights": weights(engine),
        "place": (hook.replicas, hook.replica_index, dist.get_process_group_ranks(hook.groups.inside)),
        # UsersMPU, like megatron-core's parallel_state, does not answer the last two.
        "model parallel": (engine.mpu.get_model_parallel_world_size(), engine.mpu.get_model_parallel_rank()),
        "files": engine.checkpoint_mp_rank,
    }
    engine.destroy()
    return facts


@once
def on_two_ranks() -> list[dict[str, Tensor]]:
    return run_ranks(of_data_parallel_ranks, 2)


def of_data_parallel_ranks() -> dict[str, Tensor]:
    engine = make_engine(settings())
    for step in range(1, 5):
        train_step(engine, step)
    return weights(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_data_parallel_ranks_of_a_tensor_parallel_mpu_are_cut_into_replicas(stage: int) -> None:
    for rank, found in enumerate(of_all_stages(tensor_parallel)[stage]):
        replica, slice_index = divmod(rank, 2)
        assert found["place"] == (2, replica, [2 * replica, 2 * replica + 1])
        assert found["model parallel"] == (2, slice_index) and found["files"] == slice_index
        for name, weight in on_two_ranks()[replica].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5)


class OtherParallelMPU(UsersMPU):
    """megatron-core's parallel_state with one more kind of parallelism, of size 2."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        setattr(self, f"get_{kind}_parallel_world_size", lambda: 2)


def other_parallelism() -> dict[str, str]:
    said = {}
    for kind in ("pipeline_model", "context", "expert_model", "tensor_model"):
        with pytest.raises(ConfigError) as caught:
            make_engine(settings(), mpu=OtherParallelMPU(kind))
        said[kind] = str(caught.value)
    return said


def test_parallelism_that_would_be_reduced_wrongly_is_refused() -> None:
    for said in run_ranks(other_parallelism, 2):
        assert "2 pipeline stages" in said["pipeline_model"] and "PipelineModule" in said["pipeline_model"]
        assert "context parallelism" in said["context"] and "expert parallelism" in said["expert_model"]
        assert "do not make up all ranks" in said["tensor_model"]


# -- deepspeed.zero.Init -----------------------------------------------------------------------------


class Initialised(nn.Module):
    """Initialises its weights by `apply`, as most models do; DeepSpeed gathers them for that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.inner, self.out = nn.Linear(7, 9), nn.Linear(9, 5)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
            nn.init.constant_(module.bias, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x))).float().square().mean()


def stage_3(replica_size: int | str) -> dict[str, Any]:
    return settings(optimizer={"replica_size": replica_size}, **zero(3))


def built_under_init(how: str, replica_size: int | str) -> dict[str, Any]:
    config = stage_3(replica_size)
    if how == "config":
        context = deepspeed.zero.Init(config_dict_or_path=config)
    elif how == "group":
        context = deepspeed.zero.Init(data_parallel_group=zero_init_group(config), dtype=torch.float32)
    else:
        context = deepspeed.zero.Init(dtype=torch.float32)
    with context:
        model = Initialised()
    groups = {tuple(dist.get_process_group_ranks(p.ds_process_group)) for p in model.parameters()}
    engine = make_engine(config, model)
    start = model_weights(engine)
    for step in range(4):
        x = torch.randn(2, 7, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        engine.backward(engine(x))
        engine.step()
    return {"groups": groups, "start": start, "end": weights(engine)}


@pytest.mark.parametrize("how", ["config", "group"])
@pytest.mark.parametrize("replica_size", [1, 2, "all"])
def test_zero_init_partitions_over_the_replica(how: str, replica_size: int | str) -> None:
    ranks = run_ranks(built_under_init, 4, how, replica_size)
    size = {"all": 4}.get(replica_size, replica_size)  # type: ignore[call-overload]
    for rank, found in enumerate(ranks):
        first = rank // size * size
        assert found["groups"] == {tuple(range(first, first + size))}
        assert same(found["start"], ranks[0]["start"])
        assert float(found["start"]["inner.bias"][0]) == 0.25
        assert same(found["end"], ranks[first]["end"])


def dtypes_under_init(fp16: bool) -> dict[str, list[str]]:
    """The dtypes of a model built under `zero.Init`, on a device that has fp16 or not, with our patches and without."""
    get_accelerator().is_fp16_supported = lambda: fp16
    found: dict[str, list[str]] = {}

    def build(how: str, **given: Any) -> None:
        with deepspeed.zero.Init(**given):
            model = nn.Linear(7, 9)
        found[how] = sorted({str(p.ds_tensor.dtype) for p in model.parameters()})

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        build(str(dtype), dtype=dtype)
        build(f"{dtype} beside a configuration", dtype=dtype, config_dict_or_path=stage_3("all"))
    build("a configuration", config_dict_or_path=stage_3("all"))
    build("nothing")
    lordo_ds.unregister()
    build("unregistered", dtype=torch.float32)
    return found


@pytest.mark.parametrize("fp16", [True, False])
def test_zero_init_builds_in_the_dtype_that_is_asked_for(fp16: bool) -> None:
    """DeepSpeed builds all of them in bf16 where the device has no fp16."""
    for found in run_ranks(dtypes_under_init, 2, fp16):
        for dtype in ("torch.float32", "torch.bfloat16", "torch.float16"):
            assert found[dtype] == found[f"{dtype} beside a configuration"] == [dtype]
        assert found["a configuration"] == ["torch.float32"]
        assert found["nothing"] == ["torch.float16" if fp16 else "torch.bfloat16"], "DeepSpeed's own choice stays"
        assert found["unregistered"] == ["torch.float32" if fp16 else "torch.bfloat16"], "DeepSpeed has mended it"


def test_a_model_partitioned_over_all_ranks_is_refused_with_the_way_out() -> None:
    with pytest.raises(RankFailedError, match=r"partitioned inner.weight over ranks \[0, 1\], but the replica is") as e:
        run_ranks(built_under_init, 2, "forgotten", 1)
    assert "data_parallel_group=lordo_ds.zero_init_group(config)" in str(e.value)
    assert e.value.error_type == ConfigError.__name__


def modules_differ_between_replicas() -> list[int]:
    """The check that all ranks of a replica run the same modules must not ask the other replica."""
    engine = make_engine(config_of(3))
    with lent(engine.mpu):  # as in the methods of the engine that check
        group_checked = zero_utils.get_lst_from_rank0([10 * engine.mpu.groups.replica_index + 1, 2])
        try:
            zero_utils.assert_ints_same_as_other_ranks([dist.get_rank()])
        except RuntimeError:
            group_checked.append(-1)
    engine.destroy()
    return group_checked + zero_utils.get_lst_from_rank0([dist.get_rank()])


def test_the_trace_check_of_stage_3_stays_inside_the_replica() -> None:
    found = run_ranks(modules_differ_between_replicas, 4)
    assert found == [[1, 2, 0], [1, 2, -1, 0], [11, 2, 0], [11, 2, -1, 0]]
