"""Checkpoints under tensor and pipeline parallelism: resumed bitwise with dropout, and loaded into other meshes."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lordo_ds
from lordo_ds.checkpoint import open_run
from tests.engines import weights
from tests.gpts import TIED, UNTIED, build_module, micro_batch, start_megatron
from tests.ranks import run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launchers"))

from _gpt import loss_sums

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.megatron,
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs Megatron on the CPU"),
]

MODELS = {"tied": TIED, "untied": UNTIED, "dropout": replace(TIED, dropout=0.1)}
LORDO = {"lr": 0.05, "eps": 1e-2, "rank": 8, "sync_interval": 3, "preset": "recommended", "error_feedback": "fp32"}
SYNC, BETWEEN, END = 3, 4, 7

Layout = tuple[int, int, int, int, str]
"""Tensor-parallel size, pipeline stages, shards, ZeRO stage, precision."""


def build(layout: Layout, model: str, seed: int, **optimizer: Any) -> Any:
    """An engine; its weights depend on the seed alone. Two micro-batches a step, divided over the shards."""
    import deepspeed

    tensor, pipe, shards, stage, precision = layout
    deepspeed.init_distributed(verbose=False)
    start_megatron(tensor, pipe, seed)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2 // shards,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "LoRDO", "params": {**LORDO, **optimizer, "replica_size": shards}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20}},
        "steps_per_print": 10**9,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    module, mpu = build_module(MODELS[model], dtype, pipe)
    return deepspeed.initialize(model=module, config=config, mpu=mpu)[0]


def train_to(engine: Any, start: int, stop: int) -> None:
    accumulation = engine.gradient_accumulation_steps()
    for step in range(start, stop + 1):
        first = lordo_ds.hook(engine).data_parallel_rank * accumulation  # type: ignore[union-attr]
        batches = [micro_batch(step, first + i) for i in range(accumulation)]
        if hasattr(engine, "train_batch"):
            engine.train_batch(iter([(b["tokens"], (b["labels"], b["loss_mask"])) for b in batches]))
            continue
        for one in batches:
            total, count = loss_sums(engine, one)
            engine.backward(total / count)
            engine.step()


def validation_loss(engine: Any) -> float:
    """Of four sequences that are never trained on; the same on all ranks of a replica."""
    engine.eval()
    batches = [micro_batch(999, 0), micro_batch(999, 1)]
    if hasattr(engine, "train_batch"):
        accumulation = engine.gradient_accumulation_steps()
        data = [(b["tokens"], (b["labels"], b["loss_mask"])) for b in batches]
        engine.eval_batch(iter(data), num_micro_batches=2)
        assert accumulation <= 2
        sums = torch.zeros(2, dtype=torch.float64)
        for one in engine.module.evaluated:
            sums += one.double()
        engine.module.evaluated.clear()
        dist.all_reduce(sums, group=engine.grid.get_pipe_parallel_group())
    else:
        with torch.no_grad():
            sums = sum((torch.stack(loss_sums(engine, one)).double() for one in batches), torch.zeros(2))
    engine.train()
    return float(sums[0] / sums[1])


def label(layout: Layout, model: str) -> str:
    return f"{model}-T{layout[0]}-P{layout[1]}-S{layout[2]}-Z{layout[3]}-{layout[4]}"


# -- the same mesh -----------------------------------------------------------------------------------

RESUMED: list[tuple[Layout, str]] = [
    ((2, 1, 1, 0, "fp32"), "dropout"),
    ((2, 1, 1, 1, "bf16"), "dropout"),
    ((1, 2, 1, 0, "fp32"), "dropout"),
    ((1, 2, 1, 1, "bf16"), "dropout"),
    ((1, 1, 2, 3, "fp32"), "dropout"),
    ((1, 1, 1, 0, "fp32"), "dropout"),
]


def saved_and_resumed(folder: str) -> dict[str, bool]:
    found = {}
    for layout, model in RESUMED:
        path = os.path.join(folder, label(layout, model))
        straight = build(layout, model, seed=7)
        for start, stop in ((1, 2), (3, 3), (4, 4), (5, END)):
            train_to(straight, start, stop)
            if stop < END:
                straight.save_checkpoint(path)
        expected = weights(straight)
        straight.destroy()
        for step in (2, 3, 4):  # before, at and after a sync
            resumed = build(layout, model, seed=8)
            resumed.load_checkpoint(path, f"global_step{step}")
            train_to(resumed, step + 1, END)
            now = weights(resumed)
            found[f"{label(layout, model)} step {step}"] = all(torch.equal(now[name], expected[name]) for name in now)
            resumed.destroy()
    return found


def test_resuming_is_bitwise_with_dropout(tmp_path: Path) -> None:
    for found in run_ranks(saved_and_resumed, 2, str(tmp_path), timeout_s=280):
        assert all(found.values()), [case for case, same in found.items() if not same]


# -- other meshes ------------------------------------------------------------------------------------

SAVED: list[Layout] = [(2, 1, 1, 0, "fp32"), (1, 2, 1, 0, "fp32"), (1, 2, 1, 0, "bf16"), (1, 1, 2, 3, "fp32")]
SAVED_MODELS = ("tied", "untied")


def save_all(folder: str, layouts: list[Layout]) -> dict[str, Any]:
    found = {}
    for layout in layouts:
        for model in SAVED_MODELS:
            engine = build(layout, model, seed=7)
            name = label(layout, model)
            for start, stop in ((1, SYNC), (SYNC + 1, BETWEEN)):
                train_to(engine, start, stop)
                engine.save_checkpoint(os.path.join(folder, name), client_state={"step": stop})
                found[name, stop] = validation_loss(engine)
            train_to(engine, BETWEEN + 1, END)
            found[name, END] = validation_loss(engine)
            engine.destroy()
    return found


def load_all(folder: str, cases: list[tuple[str, int, Layout]]) -> dict[Any, tuple[float, float]]:
    found = {}
    for name, step, layout in cases:
        engine = build(layout, name.split("-")[0], seed=8)
        _, client = lordo_ds.load_checkpoint(engine, os.path.join(folder, name), f"global_step{step}", reshape=True)
        assert client == {"step": step}
        after = validation_loss(engine)
        train_to(engine, step + 1, END)
        found[name, step, layout] = after, validation_loss(engine)
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("meshes")
    found = run_ranks(save_all, 2, str(folder), SAVED, timeout_s=280)[0]
    found |= run_ranks(save_all, 1, str(folder), [(1, 1, 1, 0, "fp32")], timeout_s=120)[0]
    return folder, found


def cases(step: int, pairs: list[tuple[Layout, Layout]]) -> list[tuple[str, int, Layout]]:
    return [(label(theirs, model), step, ours) for theirs, ours in pairs for model in SAVED_MODELS]


ONE = (1, 1, 1, 0, "fp32")
TO_TWO = cases(
    BETWEEN,
    [
        ((2, 1, 1, 0, "fp32"), (1, 2, 1, 1, "fp32")),
        ((1, 2, 1, 0, "fp32"), (2, 1, 1, 0, "fp32")),
        ((1, 1, 2, 3, "fp32"), (2, 1, 1, 1, "fp32")),
        ((1, 2, 1, 0, "fp32"), (1, 1, 2, 3, "fp32")),
        (ONE, (2, 1, 1, 0, "fp32")),
        (ONE, (1, 2, 1, 0, "fp32")),
    ],
)
TO_ONE = cases(
    BETWEEN,
    [
        ((2, 1, 1, 0, "fp32"), ONE),
        ((1, 2, 1, 0, "fp32"), ONE),
        ((1, 1, 2, 3, "fp32"), ONE),
        ((1, 2, 1, 0, "bf16"), (1, 1, 1, 1, "bf16")),
    ],
)


def check(found: dict[Any, tuple[float, float]], saved: dict[str, Any]) -> None:
    for (name, step, layout), (after, end) in found.items():
        assert after == pytest.approx(saved[name, step], abs=1e-6), (name, layout)
        assert end == pytest.approx(saved[name, END], abs=1e-4 if "fp32" in name else 1e-2), (name, layout)


def test_another_mesh_of_two_ranks_goes_on_from_it(saved: Any) -> None:
    for found in run_ranks(load_all, 2, str(saved[0]), TO_TWO, timeout_s=280):
        check(found, saved[1])


def test_one_rank_goes_on_from_it(saved: Any) -> None:
    check(run_ranks(load_all, 1, str(saved[0]), TO_ONE, timeout_s=200)[0], saved[1])


def test_a_mesh_is_read_whole_without_processes(saved: Any) -> None:
    """Tensor slices and stages put together are the parameters of one rank, up to the rounding of two trainings."""
    for model in SAVED_MODELS:
        one = open_run(saved[0] / label(ONE, model), f"global_step{BETWEEN}")
        for layout in SAVED:
            if layout[4] != "fp32":
                continue
            other = open_run(saved[0] / label(layout, model), f"global_step{BETWEEN}")
            assert other.parameters == one.parameters or set(other.parameters) == set(one.parameters)
            for name in one.parameters:
                assert other.parameters[name] == one.parameters[name]
                expected, found = one.state(name, 0), other.state(name, 0)
                assert found.keys() == expected.keys()
                for key in ("weight", "anchor", "exp_avg", "basis", "col_mean_sq"):
                    if key in expected:
                        scale = float(expected[key].abs().max()) or 1.0
                        difference = float((found[key] - expected[key]).abs().max()) / scale
                        assert difference < 1e-3, (model, layout, name, key, difference)
