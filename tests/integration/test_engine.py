"""LoRDO through plain `deepspeed.initialize`: what crosses replicas, when, and what the engine's keys mean."""

from __future__ import annotations

import copy
import math
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

import lordo_ds
from lordo_ds import ConfigError, LordoConfig, SyncError
from lordo_ds.core.grouping import ParameterFacts, plan_parameters
from lordo_ds.core.reference import Reference
from lordo_ds.core.schedule import sync_plan
from lordo_ds.sync.first_basis import first_bases_bytes
from tests import problems
from tests.cases import Found, once, run_cases
from tests.collectives import CollectiveCounter
from tests.engines import DTYPES, GivenGradients, load_in_this_process, make_engine, settings, train_step, weights
from tests.ranks import RankFailedError, run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]


def reference(config: dict[str, Any], replicas: int) -> Reference:
    parsed = LordoConfig.parse(config["optimizer"]["params"])
    facts = [ParameterFacts(name, shape) for name, shape in problems.SHAPES.items()]
    start = [problems.initial_weights(torch.float32) for _ in range(replicas)]
    return Reference(parsed, plan_parameters(parsed, facts), start)


# -- trajectories ------------------------------------------------------------------------------------


def engine_against_reference(dtype: str, optimizer: dict[str, Any], one_replica: bool) -> float:
    config = settings(dtype, {**optimizer, **({"replica_size": "all"} if one_replica else {})})
    engine, world = make_engine(config), dist.get_world_size()
    ref = reference(config, 1 if one_replica else world)
    worst = 0.0
    for step in range(1, 11):
        train_step(engine, step)
        each = [problems.gradients(step, m, torch.float32) for m in range(world)]
        if one_replica:
            each = [{name: torch.stack([g[name] for g in each]).mean(0) for name in each[0]}]
        ref.step(each)  # type: ignore[arg-type]
        mine = ref.weights[0 if one_replica else dist.get_rank()]
        worst = max(worst, *(float((w - mine[name]).abs().max()) for name, w in weights(engine).items()))
    return worst


FOLLOWED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "fp32": ("fp32", {}, False),
    "fp32 recommended": ("fp32", {"preset": "recommended"}, False),
    "fp32 error feedback, one replica": ("fp32", {"error_feedback": "fp32"}, True),
    "fp32 gradient every step, one replica": (
        "fp32",
        {"qh_mode": "none", "basis_source": "gradient", "sync_interval": 1, "error_feedback": "fp32"},
        True,
    ),
    "bf16": ("bf16", {}, False),
    "fp16": ("fp16", {}, False),
    "bf16 one replica": ("bf16", {}, True),
}


@once
def followed() -> Found[str]:
    return run_cases(engine_against_reference, 2, FOLLOWED, timeout_s=200)


@pytest.mark.parametrize("case", FOLLOWED)
def test_engine_follows_the_reference_in_every_precision(case: str) -> None:
    """bf16 and fp16 engines round each gradient (2^-9, 2^-11 of its size). Over ten steps of lr 1e-2 with normalised
    updates of order 1 a weight moves by up to 0.1; rounding, where a coordinate comes near zero, by up to 6e-3 of it
    (six draws of the first sketch gave 1e-3 to 5.8e-3)."""
    for difference in followed()[case]:
        assert difference < (1e-5 if case.startswith("fp32") else 1e-2), f"{difference:.1e}"


def one_replica_without_low_rank_against_deepspeed_adamw() -> float:
    params = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    ours = make_engine(settings(optimizer={**params, "replica_size": "all", "low_rank": {"exclude": [".*"]}}))
    for step in range(1, 8):
        train_step(ours, step)
    found = weights(ours)
    ours.destroy()
    del ours
    plain_config = settings()
    plain_config["optimizer"] = {"type": "AdamW", "params": {**params, "torch_adam": True}}
    plain = make_engine(plain_config)
    for step in range(1, 8):
        train_step(plain, step)
    assert lordo_ds.hook(plain) is None
    return max(float((p.detach() - found[name]).abs().max()) for name, p in plain.module.named_parameters())


def test_one_replica_without_low_rank_equals_deepspeeds_adamw() -> None:
    assert max(run_ranks(one_replica_without_low_rank_against_deepspeed_adamw, 2)) < 1e-6


def fp16_gradient_norm() -> tuple[float, float]:
    engine = make_engine(settings("fp16"))
    train_step(engine, 1)
    gradients = problems.gradients(1, dist.get_rank(), torch.float32)
    return float(engine.get_global_grad_norm()), float(torch.cat([g.flatten() for g in gradients.values()]).norm())


def test_fp16_gradients_are_unscaled_exactly_once() -> None:
    """DeepSpeed 0.19.8 divides stage 0's fp16 gradients by a loss scale that it never multiplied in."""
    for reported, true in run_ranks(fp16_gradient_norm, 2):
        assert reported == pytest.approx(true, rel=1e-3)


# -- batch keys, accumulation, data ------------------------------------------------------------------


class Quadratic(nn.Module):
    """A loss over samples, so that accumulation has something to average."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.out = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.inner(x))).square().mean()


def train_quadratic(micro: int, accumulation: int, zero: dict[str, Any] | None = None) -> dict[str, Any]:
    config = settings(train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=accumulation)
    config["gradient_clipping"] = 0.5
    engine = make_engine(config, Quadratic())
    data = torch.Generator().manual_seed(11 + dist.get_rank())
    for _ in range(7):
        samples = torch.randn(micro * accumulation, 6, generator=data)
        for chunk in samples.chunk(accumulation):
            engine.backward(engine(chunk))
            engine.step()
    return {
        "weights": weights(engine),
        "steps": engine.global_steps,
        "norm": float(engine.get_global_grad_norm()),
    }


def test_accumulating_4_micro_batches_of_1_equals_1_of_4() -> None:
    many, one = run_ranks(train_quadratic, 2, 1, 4), run_ranks(train_quadratic, 2, 4, 1)
    for a, b in zip(many, one, strict=True):
        assert a["steps"] == b["steps"] == 7
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-5)
        for name, weight in a["weights"].items():
            # The sum over micro-batches rounds in another order; the first basis comes from one such gradient.
            torch.testing.assert_close(weight, b["weights"][name], rtol=0, atol=1e-5)


def batch_meaning(batch_keys: dict[str, int]) -> list[dict[str, Any]]:
    found = []
    for kind in ("LoRDO", "AdamW"):
        config = {**settings(), **batch_keys}
        if not {"train_micro_batch_size_per_gpu"} & set(batch_keys):
            del config["train_micro_batch_size_per_gpu"]
        if kind == "AdamW":
            config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
        engine = make_engine(config)
        for micro_step in range(2 * engine.gradient_accumulation_steps()):
            train_step(engine, micro_step)
        facts = {
            "accumulation": engine.gradient_accumulation_steps(),
            "micro": engine.train_micro_batch_size_per_gpu(),
            "train_batch_size": engine.train_batch_size(),
            "global_samples": engine.global_samples,
            "global_steps": engine.global_steps,
        }
        engine.set_train_batch_size(24)
        facts["accumulation_of_24"] = engine.gradient_accumulation_steps()
        engine.set_train_micro_batch_size(5)
        facts["train_batch_size_of_5"] = engine.train_batch_size()
        found.append(facts)
        engine.destroy()
        del engine
    return found


@pytest.mark.parametrize(
    "batch_keys",
    [
        {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2},
        {"train_batch_size": 12, "gradient_accumulation_steps": 3},
        {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2},
        {"train_batch_size": 8},
    ],
)
def test_batch_keys_mean_what_plain_deepspeeds_mean(batch_keys: dict[str, int]) -> None:
    for ours, plain in run_ranks(batch_meaning, 2, batch_keys):
        assert ours == plain


class Numbers(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def samples_seen() -> list[list[int]]:
    load_in_this_process()
    config = settings(train_micro_batch_size_per_gpu=2)
    _, _, loader, _ = deepspeed.initialize(model=GivenGradients(), config=config, training_data=Numbers())
    engine = make_engine(config)
    ours = torch.utils.data.DataLoader(Numbers(), sampler=lordo_ds.data_sampler(Numbers(), engine), batch_size=2)
    return [[int(i) for batch in each for i in batch] for each in (loader, ours)]


def test_default_loader_and_data_sampler_give_each_replica_its_own_samples() -> None:
    first, second = run_ranks(samples_seen, 2)
    for a, b in zip(first, second, strict=True):
        assert sorted(a + b) == list(range(16))


# -- what crosses replicas ---------------------------------------------------------------------------


def bytes_between_and_at_syncs(optimizer: dict[str, Any], rows: bool) -> list[tuple[int, int, int, int]]:
    """Per step: (bytes counted from outside, bytes in the ledger, bytes predicted, crossing collectives)."""
    config = settings(optimizer=optimizer)
    found = []
    with CollectiveCounter() as counter:
        engine = make_engine(config)
        hook = lordo_ds.hook(engine)
        assert hook is not None
        sync, replicas = hook.optimizer.sync, hook.replicas
        assert sync is not None
        for step in range(1, 9):
            counter.phase(f"step {step}")
            before, recorded = hook.bytes_sent, len(sync.rows.pending)
            train_step(engine, step)
            crossing = [r for r in counter.crossing(lambda rank: rank) if r.phase == f"step {step}"]
            counted = 0
            for record in crossing:
                if record.op == "all_to_all_single":
                    counted += record.payload_bytes - record.kept_bytes
                    continue
                if record.op == "broadcast":  # replica 0's first bases, where the owners compute
                    counted += record.payload_bytes * (replicas - 1) * (dist.get_rank() == 0)
                    continue
                assert record.op in ("all_reduce", "all_gather_into_tensor"), record
                factor = 2 * (replicas - 1) / replicas if record.op == "all_reduce" else replicas - 1
                counted += round(record.payload_bytes * factor)
            plan = sync_plan(hook.optimizer.config, step)
            predicted = sync.predicted_bytes(plan, recorded, 2) if plan.due else 0
            if step == 1:
                predicted += first_bases_bytes(sync.bases, sync.wire)
            found.append((counted, hook.bytes_sent - before, predicted, len(crossing)))
            if rows:
                hook.record(loss=float(step), grad_norm=1.0)
    return found


@pytest.mark.parametrize(
    ("optimizer", "rows"),
    [
        ({}, True),
        ({"preset": "recommended", "pseudo_gradient_dtype": "bf16"}, False),
        ({"preset": "recommended", "pseudo_gradient_dtype": "int4"}, False),
        ({"moment_sync_interval": [3, 6], "outer": {"momentum": 0.7, "compute": "owner"}}, True),
        ({"moment_sync_interval": "never", "average_dense_moments": True}, True),
        ({"basis_source": "gradient", "low_rank": {"exclude": ["bias"]}}, False),
    ],
)
def test_bytes_cross_replicas_at_syncs_only_and_as_predicted(optimizer: dict[str, Any], rows: bool) -> None:
    for per_step in run_ranks(bytes_between_and_at_syncs, 2, optimizer, rows):
        for step, (counted, ledger, predicted, collectives) in enumerate(per_step, start=1):
            assert counted == ledger == predicted, (
                f"step {step}: {counted} counted, {ledger} in the ledger, {predicted} predicted"
            )
            assert bool(collectives) == (step == 1 or step % 3 == 0), f"step {step}"


def recorded_rows() -> list[list[dict[str, float]]]:
    engine = make_engine(settings())
    hook = lordo_ds.hook(engine)
    assert hook is not None
    batches = []
    for step in range(1, 6):
        train_step(engine, step)
        hook.record(loss=step + 10.0 * dist.get_rank(), grad_norm=2.0)
        batches.append(hook.averaged_rows())
    hook.finish()
    batches.append(hook.averaged_rows())
    return batches


def test_rows_ride_with_the_sync_and_the_final_one_flushes_them() -> None:
    for batches in run_ranks(recorded_rows, 2):
        losses = [[row["loss"] for row in rows] for rows in batches]
        # Row 3 is recorded after the sync of step 3, so it waits for the next one.
        assert losses == [[], [], [6.0, 7.0], [], [], [8.0, 9.0, 10.0]]


def rows_of_two_by_two(stage: int) -> list[dict[str, float]]:
    engine = make_engine(settings(optimizer={"replica_size": 2}, zero_optimization={"stage": stage}))
    hook = lordo_ds.hook(engine)
    assert hook is not None
    train_step(engine, 1)
    hook.record(loss=float(dist.get_rank()))
    hook.finish()
    return hook.averaged_rows()


@pytest.mark.parametrize("stage", [0, 1])
def test_rows_are_averaged_over_all_ranks_of_all_replicas(stage: int) -> None:
    assert run_ranks(rows_of_two_by_two, 4, stage) == [[{"loss": 1.5}]] * 4


# -- starting equal ----------------------------------------------------------------------------------


class WithFrozenAndBuffer(GivenGradients):
    def __init__(self, seed: int) -> None:
        super().__init__(scale=1.0 + seed)
        self.frozen = nn.Parameter(torch.full((3, 3), float(seed)), requires_grad=False)
        self.register_buffer("table", torch.full((4,), float(seed)))

    def forward(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((p.float() * gradients[n].float()).sum() for n, p in self.named_parameters() if n != "frozen")  # type: ignore[return-value]


def start_from_different_weights(dtype: str) -> dict[str, torch.Tensor]:
    engine = make_engine(settings(dtype), WithFrozenAndBuffer(seed=dist.get_rank() + 1))
    return {name: tensor.float().clone() for name, tensor in engine.module.state_dict().items()}


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_parameters_frozen_parameters_and_buffers_start_equal(dtype: str) -> None:
    first, second = run_ranks(start_from_different_weights, 2, dtype)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert float(second["frozen"][0, 0]) == 1.0 and float(second["table"][0]) == 1.0


# -- faults ------------------------------------------------------------------------------------------


def overflow_on_one_replica(
    bad_steps: list[int], warmup: bool = True, steps: int = 9, lost_at: int = 0
) -> dict[str, Any]:
    """fp16 on two replicas. Rank 1 overflows at `bad_steps`; rank 0's loss is not finite at `lost_at`."""
    warmup_lr = {"type": "WarmupLR", "params": {"warmup_num_steps": 50, "warmup_max_lr": 1e-2}}
    config = settings("fp16", **({"scheduler": warmup_lr} if warmup else {}))
    engine = make_engine(config)
    hook = lordo_ds.hook(engine)
    assert hook is not None
    for step in range(1, steps + 1):
        bad = dist.get_rank() == 1 and step in bad_steps
        train_step(engine, step, spoil=math.inf if bad else None)
        hook.record(loss=math.nan if dist.get_rank() == 0 and step == lost_at else 1.0)
    hook.finish()
    return {
        "skipped": engine.skipped_steps,
        "steps": engine.global_steps,
        "scheduled": engine.lr_scheduler.last_batch_iteration if warmup else None,
        "lr": engine.get_lr()[0],
        "status": lordo_ds.status(engine),
        "weights": weights(engine),
        "low_precision": {name: p.detach().float() for name, p in engine.module.named_parameters()},
    }


@pytest.mark.parametrize(
    ("bad_steps", "steps", "lost_at"), [([4], 6, 5), ([7, 8], 8, 0)], ids=["left out", "final sync"]
)
def test_schedules_go_on_as_that_of_the_replica_that_executed_most(
    bad_steps: list[int], steps: int, lost_at: int
) -> None:
    """Also where that one is left out of the sync, and where the sync is the final one."""
    ranks = run_ranks(overflow_on_one_replica, 2, bad_steps, True, steps, lost_at)
    assert [rank["skipped"] for rank in ranks] == [0, len(bad_steps)]
    assert [rank["status"]["syncs_with_replicas_left_out"] for rank in ranks] == [int(lost_at > 0)] * 2
    assert [rank["status"]["executed_steps"] for rank in ranks] == [steps] * 2
    assert ranks[0]["scheduled"] == ranks[1]["scheduled"] and ranks[0]["lr"] == ranks[1]["lr"]


@pytest.mark.parametrize("bad_steps", [[1], [3], [1, 2, 3, 4], [5, 8]])
def test_an_fp16_overflow_on_one_replica_keeps_the_replicas_in_step(bad_steps: list[int]) -> None:
    good, bad = run_ranks(overflow_on_one_replica, 2, bad_steps)
    assert (good["skipped"], bad["skipped"]) == (0, len(bad_steps))
    assert good["steps"] == bad["steps"] == 9
    assert good["status"]["syncs"] == bad["status"]["syncs"] == 3
    assert good["status"]["executed_steps"] == bad["status"]["executed_steps"] == 9
    assert good["lr"] == bad["lr"]  # step 9 ended in a sync: the schedule is that of the furthest replica
    for name, weight in good["weights"].items():
        assert torch.isfinite(weight).all()
        assert torch.equal(weight, bad["weights"][name])
        assert torch.equal(bad["low_precision"][name], weight.half().float())


def test_an_fp16_overflow_follows_the_reference_with_that_step_skipped() -> None:
    good, _ = run_ranks(overflow_on_one_replica, 2, [2, 5], warmup=False)
    ref = reference(settings("fp16"), 2)
    for step in range(1, 10):
        each: list[Any] = [problems.gradients(step, m, torch.float32) for m in range(2)]
        if step in (2, 5):
            each[1] = None
        ref.step(each)
    for name, weight in good["weights"].items():
        torch.testing.assert_close(weight, ref.weights[0][name], rtol=0, atol=2e-3)


def nan_on_some_replicas(bad: dict[int, list[int]], optimizer: dict[str, Any], steps: int = 9) -> dict[str, Any]:
    engine = make_engine(settings(optimizer=optimizer))
    for step in range(1, steps + 1):
        train_step(engine, step, spoil=math.nan if step in bad.get(dist.get_rank(), []) else None)
    hook = lordo_ds.hook(engine)
    assert hook is not None and hook.optimizer.sync is not None
    items = hook.optimizer.sync.items
    return {
        "weights": weights(engine),
        "status": lordo_ds.status(engine),
        "moments": {i.plan.name: {kept.name: t.clone() for kept, t, _ in i.moments()} for i in items},
    }


@pytest.mark.parametrize(
    "optimizer", [{}, {"preset": "recommended"}, {"moment_sync_interval": "never"}, {"projection": "local"}]
)
def test_a_nonfinite_replica_is_left_out_and_reseeded(optimizer: dict[str, Any]) -> None:
    good, bad = run_ranks(nan_on_some_replicas, 2, {1: [5]}, optimizer)
    assert good["status"]["syncs_with_replicas_left_out"] == 1
    for name, weight in good["weights"].items():
        assert torch.isfinite(weight).all() and torch.equal(weight, bad["weights"][name])
        for moment in bad["moments"][name].values():
            assert torch.isfinite(moment).all()
    config = settings(optimizer=optimizer)
    ref = reference(config, 2)
    for step in range(1, 10):
        each = [problems.gradients(step, m, torch.float32) for m in range(2)]
        if step == 5:
            each[1] = {name: g * math.nan for name, g in each[1].items()}
        ref.step(each)  # type: ignore[arg-type]
    for m, found in enumerate((good, bad)):
        for name, weight in found["weights"].items():
            torch.testing.assert_close(weight, ref.weights[m][name], rtol=0, atol=1e-5)


def test_when_no_replica_is_finite_all_return_to_the_anchor() -> None:
    good, bad = run_ranks(nan_on_some_replicas, 2, {0: [4], 1: [5]}, {}, steps=6)
    at_first_sync, _ = run_ranks(nan_on_some_replicas, 2, {}, {}, steps=3)
    for name, weight in good["weights"].items():
        assert torch.equal(weight, bad["weights"][name])
        assert torch.equal(weight, at_first_sync["weights"][name])
    assert good["status"]["nonfinite_syncs_in_a_row"] == 1


def test_too_many_nonfinite_syncs_stop_the_run() -> None:
    always = {rank: list(range(2, 99)) for rank in range(2)}
    with pytest.raises(RankFailedError, match="no replica was finite at 2 syncs in a row") as caught:
        run_ranks(nan_on_some_replicas, 2, always, {"max_nonfinite_syncs": 2}, steps=30)
    assert caught.value.error_type == SyncError.__name__


def tampered_basis(what: str) -> None:
    engine = make_engine(settings())
    for step in range(1, 7):
        train_step(engine, step)
        hook = lordo_ds.hook(engine)
        assert hook is not None and hook.optimizer.sync is not None
        if step == 4 and dist.get_rank() == 1:
            item = next(i for i in hook.optimizer.sync.items if i.plan.name == "square")
            if what == "basis":
                item.state["basis"][:, 0].neg_()
            else:
                item.state["anchor"][0] += 1e-3


@pytest.mark.parametrize(("what", "where"), [("basis", "bases differ before"), ("anchor", "replicas differ after")])
def test_a_stale_basis_or_anchor_on_one_replica_stops_the_run_by_name(what: str, where: str) -> None:
    with pytest.raises(RankFailedError, match=f"{where} the sync at step 6: square") as caught:
        run_ranks(tampered_basis, 2, what)
    assert caught.value.error_type == SyncError.__name__


# -- checkpoints -------------------------------------------------------------------------------------


def save_and_resume(folder: str, dtype: str, optimizer: dict[str, Any], at: int) -> dict[str, float]:
    config = settings(dtype, optimizer, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 20}})
    straight = make_engine(copy.deepcopy(config))
    for step in range(1, 9):
        train_step(straight, step)
        if step == at:
            straight.save_checkpoint(folder, client_state={"samples": 7})
    expected = weights(straight)
    bytes_sent = lordo_ds.status(straight)["bytes_sent_total"]
    straight.destroy()
    resumed = make_engine(copy.deepcopy(config), GivenGradients(scale=3.0))
    _, client = resumed.load_checkpoint(folder)
    assert client["samples"] == 7
    for step in range(at + 1, 9):
        train_step(resumed, step)
    started = lordo_ds.status(resumed)["bytes_sent_total"]
    assert started == bytes_sent, (started, bytes_sent)
    return {name: float((w - expected[name]).abs().max()) for name, w in weights(resumed).items()}


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("at", "optimizer"),
    [(2, {}), (3, {"preset": "recommended"}), (4, {"error_feedback": "bf16", "projection": "local"})],
)
def test_resume_is_bitwise_before_at_and_after_a_sync(
    tmp_path: Any, dtype: str, at: int, optimizer: dict[str, Any]
) -> None:
    for differences in run_ranks(save_and_resume, 2, str(tmp_path), dtype, optimizer, at):
        assert set(differences.values()) == {0.0}, differences
    tag = tmp_path / f"global_step{at}"
    assert sorted(p.name for p in tag.iterdir()) == ["complete.json", "ranks.pt", "replica_0", "replica_1"]
    assert (tmp_path / "latest").read_text().strip() == tag.name


# -- registration and refusals -----------------------------------------------------------------------


def registered_types() -> list[str]:
    found = []
    for name in ("LoRDO", "lordo", "LORDO"):
        config = settings()
        config["optimizer"]["type"] = name
        engine = make_engine(config)
        found.append(type(engine.basic_optimizer).__name__)
        engine.destroy()
    lordo_ds.unregister()
    lordo_ds.unregister()  # twice changes nothing
    try:
        make_engine(settings())
    except Exception as error:
        found.append(type(error).__name__)
    lordo_ds.register()
    train_step(make_engine(settings()), 1)
    return found


def test_the_type_is_registered_in_any_case_and_unregistering_removes_it() -> None:
    found = run_ranks(registered_types, 1)[0]
    assert found[:3] == ["LoRDO"] * 3
    assert len(found) == 4 and found[3] != "LoRDO"


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        make_engine(config)
    return str(caught.value)


REFUSED = {
    "misspelt key": ({"rnak": 8}, {}, r'optimizer.params.rnak = 8 is not a known key: did you mean "rank"'),
    "omega": ({"omega": 1.5}, {}, r"omega = 1.5 must be <= 1.0 \(nearest: 1.0\)"),
    "rank": ({"rank": 0}, {}, r"rank = 0 must be >= 1 \(nearest: 1\)"),
    "replica size": ({"replica_size": 2}, {}, r"must divide the data-parallel size 1 \(nearest: 1\)"),
    "nothing to project": ({"low_rank": {"include": ["bias"]}}, {}, "no parameter can be projected"),
    "pattern": ({"low_rank": {"exclude": ["wieght"]}}, {}, "'wieght' matches no parameter name"),
    "autocast": (
        {},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        "torch_autocast is not supported",
    ),
    "quantised gradients": (
        {},
        {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
        "zero_optimization.zero_quantized_gradients is not supported",
    ),
    "optimizer state on NVMe": (
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
        'zero_optimization.offload_optimizer to NVMe is not supported in this version: use "cpu"',
    ),
    "part of the optimizer state on the host": (
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        "zero_optimization.offload_optimizer.ratio is not supported in this version: leave it out",
    ),
    "SuperOffload": (
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        "zero_optimization.offload_optimizer.super_offload is not supported",
    ),
    "ZenFlow": (
        {},
        {
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "cpu"},
                "zenflow": {"select_strategy": "step", "select_interval": 5},
            }
        },
        "zero_optimization.zenflow is not supported",
    ),
    "secondary partition": (
        {},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        "zero_optimization.zero_hpz_partition_size is not supported",
    ),
    "elastic checkpoint": (
        {},
        {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}},
        "zero_optimization.elastic_checkpoint is not supported",
    ),
    "universal checkpoint": ({}, {"checkpoint": {"load_universal": True}}, "checkpoint.load_universal is not"),
    "DeepCompile": ({}, {"compile": {"deepcompile": True}}, "compile.deepcompile is not supported"),
    "half-precision masters": (
        {},
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, "zero_optimization": {"stage": 2}},
        "bf16.bf16_master_weights_and_grads is not supported",
    ),
    "checkpoint writer": (
        {},
        {"checkpoint": {"writer": {"type": "python"}}},
        "checkpoint.writer is not supported",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_supported_is_refused_in_one_line(case: str) -> None:
    optimizer, keys, message = REFUSED[case]
    found = run_ranks(refusal, 1, settings(optimizer=optimizer, **keys))[0]
    assert "\n" not in found
    import re

    assert re.search(message, found), found
