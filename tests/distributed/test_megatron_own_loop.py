"""LoRDO in Megatron's own training loop follows the reference, survives overflows, resumes, and counts its tokens."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lordo_ds import CheckpointError, LordoConfig
from lordo_ds.core.grouping import plan_parameters
from lordo_ds.core.reference import Reference
from lordo_ds.core.schedule import sync_plan
from tests import problems
from tests.collectives import CollectiveCounter
from tests.gpts import start_megatron
from tests.own_loop import (
    CLIP,
    DECAY,
    EPS,
    LR,
    SETTINGS,
    Gradients,
    Loop,
    Weights,
    forward_toy,
    optimizer_config,
    toy_config,
)
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.megatron,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs Megatron on the CPU"),
]

STEPS = 8


def given(step: int, rank: int, dtype: torch.dtype) -> Gradients:
    """A rank's gradient at a step, as a parameter of that dtype receives it."""
    return {name: g.to(dtype).float() for name, g in problems.gradients(step, rank, torch.float32).items()}


def replica_gradient(step: int, ranks: Any, dtype: torch.dtype) -> tuple[Gradients, float]:
    """The mean over the ranks of a replica, clipped as Megatron clips, and its norm before."""
    own = [given(step, rank, dtype) for rank in ranks]
    mean = {name: torch.stack([g[name] for g in own]).mean(0) for name in own[0]}
    norm = float(torch.cat([g.flatten().double() for g in mean.values()]).norm())
    factor = min(1.0, CLIP / (norm + 1e-6))
    return {name: g * factor for name, g in mean.items()}, norm


def reference_of(replicas: int, **settings: Any) -> Reference:
    config = LordoConfig.parse({**SETTINGS, "lr": LR, "eps": EPS, "weight_decay": DECAY, **settings})
    plans = plan_parameters(config, problems.facts())
    return Reference(config, plans, [problems.initial_weights(torch.float32) for _ in range(replicas)])


def worst_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((ours[n].float() - w).abs().max() / w.abs().max()) for n, w in theirs.items())


def against_the_reference(replica_size: int, dtype: torch.dtype, overlap: bool) -> dict[str, Any]:
    start_megatron()
    loop = Loop.of_toys(replica_size, dtype, overlap=overlap)
    handle, lordo = loop.optimizer.handle, loop.optimizer.optimizer
    rank, count = dist.get_rank(), dist.get_world_size() // replica_size
    layout = [range(m * replica_size, (m + 1) * replica_size) for m in range(count)]
    reference, worst, crossed, sent, norms = reference_of(count), 0.0, [], [], []
    with CollectiveCounter() as counter:
        for step in range(1, STEPS + 1):
            counter.phase(str(step))
            # Two micro-batches whose mean is the gradient, in every dtype.
            batches = [{n: f * g for n, g in given(step, rank, dtype).items()} for f in (4.0, -2.0)]
            (executed, norm, _), _ = loop.step(batches, forward_toy)
            expected = [replica_gradient(step, ranks, dtype) for ranks in layout]
            reference.step([gradient for gradient, _ in expected])
            mains = {name: getattr(p, "main_param", p) for name, p in loop.module.named_parameters()}
            worst = max(worst, worst_difference(mains, reference.weights[handle.replica_index]))
            assert executed and all(torch.equal(w.to(dtype), loop.weights()[name]) for name, w in mains.items())
            norms.append((norm, expected[handle.replica_index][1]))
            plan = sync_plan(lordo.config, step)
            assert handle.synced == plan.due
            if plan.due:
                sent.append((lordo.last_report.bytes_sent, lordo.sync.predicted_bytes(plan, rows=0, row_length=0)))
            elif step > 1:  # the first basis comes from all replicas
                crossed += counter.crossing(lambda r: r // replica_size, str(step))
    return {"worst": worst, "crossed": crossed, "sent": sent, "norms": norms, "replica": handle.replica_index}


@pytest.mark.parametrize(
    ("replica_size", "world", "dtype", "overlap"),
    [
        (1, 2, torch.float32, False),
        (2, 4, torch.float32, True),
        (1, 2, torch.bfloat16, False),
        (2, 4, torch.bfloat16, False),
    ],
    ids=str,
)
def test_own_loop_follows_the_reference(replica_size: int, world: int, dtype: torch.dtype, overlap: bool) -> None:
    found = run_ranks(against_the_reference, world, replica_size, dtype, overlap)
    for rank in found:
        assert rank["worst"] < 1e-5
        assert not rank["crossed"]
        assert len(rank["sent"]) == 2 and all(sent == predicted > 0 for sent, predicted in rank["sent"])
        assert all(norm == pytest.approx(expected, rel=1e-4) for norm, expected in rank["norms"])
    assert found[0]["norms"] != found[-1]["norms"], "the norm is the replica's own"


def overflowing() -> tuple[float, list[bool], list[int], list[float]]:
    """Replica 1 overflows at steps 1, 4 and 6; the sync is due at 3 and 6."""
    start_megatron()
    loop = Loop.of_toys(dtype=torch.float16, initial_loss_scale=16.0, hysteresis=1, clip_grad=0.0)
    reference, rank, worst = reference_of(2), dist.get_rank(), 0.0
    executed, taken_over, scales = [], [], []
    for step in range(1, STEPS + 1):
        overflows = [m == 1 and step in (1, 4, 6) for m in (0, 1)]
        gradient = given(step, rank, torch.float16)
        if overflows[rank]:
            gradient["tall"] = torch.full_like(gradient["tall"], float("inf"))
        (applied, _, _), _ = loop.step([gradient], forward_toy)
        reference.step([None if over else given(step, m, torch.float16) for m, over in enumerate(overflows)])
        mains = {name: p.main_param for name, p in loop.module.named_parameters()}
        worst = max(worst, worst_difference(mains, reference.weights[rank]))
        executed.append(applied)
        taken_over.append(loop.optimizer.steps_taken_over)
        scales.append(float(loop.optimizer.get_loss_scale()))
    return worst, executed, taken_over, scales


def test_an_overflow_on_one_replica_skips_its_step_there_and_the_sync_comes_all_the_same() -> None:
    (worst0, executed0, taken0, scales0), (worst1, executed1, taken1, scales1) = run_ranks(overflowing, 2)
    assert max(worst0, worst1) < 1e-4
    assert executed0 == [True] * STEPS and executed1 == [step not in (1, 4, 6) for step in range(1, STEPS + 1)]
    assert not any(taken0) and taken1 == [0, 0, 1, 0, 0, 2, 0, 0], "its schedule is behind by the steps it skipped"
    assert scales0[-1] == 16.0 and scales1[-1] == 2.0, "loss scales are each replica's own"


def streaming() -> tuple[float, list[int], bool]:
    """Two fragments that land a step later; replica 1 overflows at steps 1, 4 and 6, and the run is saved in flight."""
    start_megatron()
    settings = {"streaming": {"fragments": 2, "delay_steps": 1}}
    loop = Loop.of_toys(dtype=torch.float16, initial_loss_scale=16.0, hysteresis=1, clip_grad=0.0, settings=settings)
    reference, rank, worst, taken_over = reference_of(2, **settings), dist.get_rank(), 0.0, []
    for step in range(1, STEPS):
        overflows = [m == 1 and step in (1, 4, 6) for m in (0, 1)]
        gradient = given(step, rank, torch.float16)
        if overflows[rank]:
            gradient["tall"] = torch.full_like(gradient["tall"], float("inf"))
        loop.step([gradient], forward_toy)
        reference.step([None if over else given(step, m, torch.float16) for m, over in enumerate(overflows)])
        mains = {name: p.main_param for name, p in loop.module.named_parameters()}
        worst = max(worst, worst_difference(mains, reference.weights[rank]))
        assert all(torch.equal(w.to(torch.float16), loop.weights()[name]) for name, w in mains.items())
        taken_over.append(loop.optimizer.steps_taken_over)
    with pytest.raises(CheckpointError, match=r"call drain\(\)"):
        loop.optimizer.state_dict()
    drained = loop.optimizer.handle.drain()
    reference.flights.land()
    worst = max(worst, worst_difference(mains, reference.weights[rank]))
    assert all(torch.equal(w.to(torch.float16), loop.weights()[name]) for name, w in mains.items())
    loop.optimizer.load_state_dict(loop.optimizer.state_dict())
    return worst, taken_over, drained


def test_fragments_land_in_megatrons_own_loop_too() -> None:
    (worst0, taken0, drained0), (worst1, taken1, drained1) = run_ranks(streaming, 2)
    assert max(worst0, worst1) < 1e-4 and drained0 and drained1
    # Fragments begin at steps 1, 3, 4, 6 and 7: what was behind when one began is made up for where it lands.
    assert not any(taken0) and taken1 == [0, 1, 0, 0, 1, 0, 1], taken1


def resumed(dtype: torch.dtype) -> tuple[list[tuple[int, dict[str, Tensor]]], list[tuple[int, dict[str, Tensor]]]]:
    start_megatron()
    rank, runs = dist.get_rank(), []
    loop = Loop.of_toys(dtype=dtype)
    saved = io.BytesIO()
    for resume in (False, True):
        if resume:
            saved.seek(0)
            state = torch.load(saved, weights_only=True)
            loop = Loop.of_toys(dtype=dtype)
            loop.module.load_state_dict(state["model"])
            loop.optimizer.load_state_dict(state["optimizer"])
        seen = []
        for step in range(5 if resume else 1, STEPS + 1):
            loop.step([given(step, rank, dtype)], forward_toy)
            loop.optimizer.handle.record(loss=float(step + rank))
            seen += [(loop.optimizer.handle.bytes_sent, loop.weights())] if step >= 5 else []
            if step == 4 and not resume:
                loop.optimizer.param_groups[0]["lr"] *= 0.5  # as a schedule does
                torch.save({"model": loop.module.state_dict(), "optimizer": loop.optimizer.state_dict()}, saved)
        loop.optimizer.handle.finish()
        rows = loop.optimizer.handle.averaged_rows()
        assert [row["loss"] for row in rows][-4:] == [5.5, 6.5, 7.5, 8.5], rows
        runs.append([*seen, (loop.optimizer.handle.bytes_sent, loop.weights())])
    return runs[0], runs[1]


def misfits() -> list[str]:
    """States that only rank 1 cannot load."""
    start_megatron()
    loop = Loop.of_toys(dtype=torch.bfloat16)
    loop.step([given(1, dist.get_rank(), torch.bfloat16)], forward_toy)
    before = loop.optimizer.state_dict()["fp32_from_fp16_params"][0][0].clone()
    said = []
    for forge in (
        lambda state: state["fp32_from_fp16_params"][0].__setitem__(0, torch.ones(1)),
        lambda state: state["fp32_from_fp16_params"][0].pop(),
        lambda state: state["optimizer"].pop("lordo"),
    ):
        saved = io.BytesIO()
        torch.save(loop.optimizer.state_dict(), saved)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        if dist.get_rank() == 1:
            forge(state)
        with pytest.raises(CheckpointError) as caught:
            loop.optimizer.load_state_dict(state)
        assert torch.equal(before, loop.optimizer.state_dict()["fp32_from_fp16_params"][0][0])
        said.append(str(caught.value))
    return said


def test_a_state_that_does_not_fit_one_rank_is_refused_on_all() -> None:
    first, second = run_ranks(misfits, 2)
    assert first == second
    assert "an fp32 weight is (1,) torch.float32 in the saved state" in first[0]
    assert "an fp32 weight is none" in first[1] and "was not saved by LoRDO" in first[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(dtype: torch.dtype) -> None:
    found = run_ranks(resumed, 2, dtype)
    for through, again in found:
        for (bytes_through, weights), (bytes_again, weights_again) in zip(through, again, strict=True):
            assert bytes_through == bytes_again
            assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert all(torch.equal(found[0][0][-1][1][n], found[1][0][-1][1][n]) for n in problems.SHAPES), "finish() syncs"


def counting_tokens() -> tuple[float, list[Any], str]:
    """Per-token losses: replica 0 has 4 tokens in a step, replica 1 has 8."""
    from megatron.core.distributed import finalize_model_grads

    start_megatron()
    loop = Loop.of_toys(model={"calculate_per_token_loss": True})
    rank = dist.get_rank()
    tokens = torch.tensor(4 * (rank + 1), dtype=torch.int)

    def forward(batches: Iterator[Gradients], model: nn.Module) -> Any:
        return model(next(batches)), lambda loss: (loss, tokens, {"loss": loss.detach()})

    with CollectiveCounter() as counter:
        loop.run(iter([given(1, rank, torch.float32)]), forward, 1)
    ratio = loop.module.tall.main_grad / given(1, rank, torch.float32)["tall"]
    loop.module.config.finalize_model_grads_func = finalize_model_grads
    with pytest.raises(ValueError) as refused:
        loop.optimizer.step()
    return float(ratio.mean() * tokens), counter.crossing([0, 1]), str(refused.value)


def test_tokens_are_counted_inside_the_replica() -> None:
    for ratio, crossed, refused in run_ranks(counting_tokens, 2):
        assert ratio == pytest.approx(1.0, rel=1e-4)
        assert not crossed
        assert "set finalize_model_grads_func of the model's config to replicas.finalize()" in refused


def groups_given_by_hand() -> tuple[bool, list[Any]]:
    """DistributedDataParallel and the schedule are given a `pg_collection`, outside the block."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_patches.ddp import replicas
    from megatron_patches.optimizer import lordo_optimizer

    start_megatron()
    config = toy_config(calculate_per_token_loss=True)
    config.finalize_model_grads_func = None  # set below, as a script may after the optimizer is made
    with replicas(1) as mine:
        pass
    groups, rank = mine.groups_for_megatron(), dist.get_rank()
    module = Weights(config, torch.float32)
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(), module, pg_collection=groups)
    loop = Loop(module, mine, chunk, lordo_optimizer([chunk], SETTINGS, optimizer_config(), mine))
    config.finalize_model_grads_func = mine.finalize()

    def forward(batches: Iterator[Gradients], model: nn.Module) -> Any:
        tokens = torch.tensor(2, dtype=torch.int)
        return model(next(batches)), lambda loss: (loss, tokens, {"loss": loss.detach()})

    with CollectiveCounter() as counter:
        loop.run(iter([given(1, rank, torch.float32)]), forward, 1, pg_collection=groups)
    expected = given(1, rank, torch.float32)["tall"] / 2
    return torch.allclose(module.tall.main_grad, expected), counter.crossing([0, 1])


def test_groups_may_be_given_by_hand() -> None:
    assert run_ranks(groups_given_by_hand, 2) == [(True, [])] * 2


def given_other_weights(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    start_megatron()
    loop = Loop.of_toys(dtype=dtype)
    for step in (1, 2, 3, 4):
        loop.step([given(step, dist.get_rank(), dtype)], forward_toy)
    with torch.no_grad():
        for parameter in loop.module.parameters():
            parameter.fill_(dist.get_rank() + 2.0)
    loop.optimizer.reload_model_params()
    anchors = {name: state[name]["anchor"] for state in loop.optimizer.state.values() for name in state}
    return loop.weights(), anchors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_given_to_the_model_are_where_the_next_sync_starts_from(dtype: torch.dtype) -> None:
    for weights, anchors in run_ranks(given_other_weights, 2, dtype):
        assert all(bool((tensor == 2.0).all()) for tensor in (*weights.values(), *anchors.values()))


def loaded_without_a_word(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Nobody calls reload_model_params: Megatron's bf16 optimizer would overwrite what was loaded."""
    start_megatron()
    loop = Loop.of_toys(dtype=dtype, settings={"outer": {"momentum": 0.7, "orthogonalize": True}})
    for step in range(1, 7):
        if step == 5:
            with torch.no_grad():
                for parameter in loop.module.parameters():
                    parameter.fill_(2.0)
        loop.step([given(step, dist.get_rank(), dtype)], forward_toy)
    mains = {name: getattr(p, "main_param", p).detach().clone() for name, p in loop.module.named_parameters()}
    loop.module.wide = nn.Parameter(loop.module.wide.detach().clone())
    with pytest.raises(ValueError) as refused:
        loop.step([given(7, dist.get_rank(), dtype)], forward_toy)
    return loop.weights(), mains, str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_loaded_between_two_steps_are_those_that_are_trained(dtype: torch.dtype) -> None:
    for weights, mains, refused in run_ranks(loaded_without_a_word, 2, dtype):
        assert all(float((tensor - 2.0).norm() / tensor.norm()) < 0.1 for tensor in mains.values())
        assert all(torch.equal(weights[name], main.to(dtype)) for name, main in mains.items())
        assert "wide was replaced by another parameter" in refused


def saved_sharded(folder: str) -> tuple[list[str], dict[str, Tensor], list[dict[str, Tensor]]]:
    """`dist_checkpointing.save` of the model after every step, by a script that has imported it by name before."""
    from megatron.core.dist_checkpointing import load, save

    start_megatron()
    loop = Loop.of_toys(dtype=torch.bfloat16, settings={"low_rank": {"exclude": [".*"]}})
    refusals, at_sync = [], []
    for step in range(1, 5):
        loop.step([given(step, dist.get_rank(), torch.bfloat16)], forward_toy)
        path = Path(folder, str(step))
        path.mkdir(exist_ok=True)
        dist.barrier()
        try:
            save(loop.chunk.sharded_state_dict(), str(path))
            at_sync.append(loop.weights())
            refusals.append("")
        except CheckpointError as error:
            refusals.append(str(error))
    with pytest.raises(NotImplementedError, match=r"save state_dict\(\) in one file per rank"):
        loop.optimizer.sharded_state_dict({})
    loop.optimizer.handle.finish()
    save(loop.chunk.sharded_state_dict(), str(path))
    found = load(loop.chunk.sharded_state_dict(), str(Path(folder, "3")))
    return refusals, {name.removeprefix("module."): t.detach() for name, t in found.items()}, at_sync


def test_a_sharded_save_between_syncs_is_refused_and_one_at_a_sync_holds_everybodys_model(tmp_path: Path) -> None:
    for refusals, loaded, at_sync in run_ranks(saved_sharded, 2, str(tmp_path)):
        assert [bool(one) for one in refusals] == [True, True, False, True], refusals
        assert "at step 2, 2 after the last sync" in refusals[1] and "the next one ends step 3)" in refusals[1]
        assert all(torch.equal(loaded[name], weight) for name, weight in at_sync[0].items())


def scheduled() -> list[tuple[float, float]]:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    start_megatron()
    optimizer = Loop.of_toys(weight_decay=0.5, overrides=None).optimizer
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LR,
        min_lr=0.0,
        lr_warmup_steps=2,
        lr_decay_steps=10,
        lr_decay_style="linear",
        start_wd=0.5,
        end_wd=0.5,
        wd_incr_steps=10,
        wd_incr_style="constant",
    )
    scheduler.step(increment=1)
    return sorted((group["lr"], group["weight_decay"]) for group in optimizer.param_groups)


def test_megatrons_scheduler_drives_the_groups() -> None:
    assert run_ranks(scheduled, 2) == [[(LR / 2, 0.0), (LR / 2, 0.5)]] * 2
