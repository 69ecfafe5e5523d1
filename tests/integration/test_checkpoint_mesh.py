"""Checkpoints under tensor and pipeline parallelism: resumed bitwise with dropout, and loaded into other meshes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lordo_ds
from lordo_ds.checkpoint import open_run
from pretrain.gpt import loss_sums
from tests.cases import Found, run_cases
from tests.engines import weights
from tests.gpts import TIED, UNTIED, build_module, micro_batch, start_megatron

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


RESUMED_LABELS = [label(*case) for case in RESUMED]


def saved_and_resumed(path: str, layout: Layout, model: str) -> dict[int, bool]:
    """By the step that it was resumed at: whether it ended in the same weights."""
    straight, found = build(layout, model, seed=7), {}
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
        found[step] = all(torch.equal(now[name], expected[name]) for name in now)
        resumed.destroy()
    return found


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Found[str]:
    folder = tmp_path_factory.mktemp("resumed")
    cases = {name: (str(folder / name), *case) for name, case in zip(RESUMED_LABELS, RESUMED, strict=True)}
    return run_cases(saved_and_resumed, 2, cases, timeout_s=280)


@pytest.mark.parametrize("case", RESUMED_LABELS)
def test_resuming_is_bitwise_with_dropout(resumed: Found[str], case: str) -> None:
    assert resumed[case] == [{2: True, 3: True, 4: True}] * 2


# -- other meshes ------------------------------------------------------------------------------------

SAVED: list[Layout] = [(2, 1, 1, 0, "fp32"), (1, 2, 1, 0, "fp32"), (1, 2, 1, 0, "bf16"), (1, 1, 2, 3, "fp32")]
SAVED_MODELS = ("tied", "untied")
ONE: Layout = (1, 1, 1, 0, "fp32")


Saved = tuple[Path, Found[str], Found[str]]
LoadCase = tuple[str, int, Layout]


def save(path: str, layout: Layout, model: str) -> dict[int, float]:
    """Validation losses by step."""
    engine, found = build(layout, model, seed=7), {}
    for start, stop in ((1, SYNC), (SYNC + 1, BETWEEN)):
        train_to(engine, start, stop)
        engine.save_checkpoint(path, client_state={"step": stop})
        found[stop] = validation_loss(engine)
    train_to(engine, BETWEEN + 1, END)
    found[END] = validation_loss(engine)
    engine.destroy()
    return found


def load(folder: str, name: str, step: int, layout: Layout) -> tuple[float, float]:
    """The validation losses after loading and at the end."""
    engine = build(layout, name.split("-")[0], seed=8)
    _, client = lordo_ds.load_checkpoint(engine, os.path.join(folder, name), f"global_step{step}", reshape=True)
    assert client == {"step": step}
    after = validation_loss(engine)
    train_to(engine, step + 1, END)
    found = after, validation_loss(engine)
    engine.destroy()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder, and what was saved on two ranks and on one."""
    folder = tmp_path_factory.mktemp("meshes")

    def of(layouts: list[Layout], ranks: int) -> Found[str]:
        pairs = [(layout, model) for layout in layouts for model in SAVED_MODELS]
        return run_cases(save, ranks, {label(*pair): (str(folder / label(*pair)), *pair) for pair in pairs})

    return folder, of(SAVED, 2), of([ONE], 1)


@pytest.fixture(scope="module")
def loaded_on_two(saved: Saved) -> Found[LoadCase]:
    return run_cases(load, 2, {case: (str(saved[0]), *case) for case in TO_TWO}, timeout_s=280)


@pytest.fixture(scope="module")
def loaded_on_one(saved: Saved) -> Found[LoadCase]:
    return run_cases(load, 1, {case: (str(saved[0]), *case) for case in TO_ONE}, timeout_s=200)


def cases(step: int, pairs: list[tuple[Layout, Layout]]) -> list[LoadCase]:
    return [(label(theirs, model), step, ours) for theirs, ours in pairs for model in SAVED_MODELS]


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


def load_case_id(case: LoadCase) -> str:
    return f"{case[0]}-into-{label(case[2], '')[1:]}"


def check(found: list[tuple[float, float]], saved: Saved, case: LoadCase) -> None:
    name, step, _ = case
    losses = next(of for of in saved[1:] if name in of)[name][0]
    for after, end in found:
        assert after == pytest.approx(losses[step], abs=1e-6)
        assert end == pytest.approx(losses[END], abs=1e-4 if "fp32" in name else 1e-2)


@pytest.mark.parametrize("case", TO_TWO, ids=load_case_id)
def test_another_mesh_of_two_ranks_goes_on_from_it(
    saved: Saved, loaded_on_two: Found[LoadCase], case: LoadCase
) -> None:
    check(loaded_on_two[case], saved, case)


@pytest.mark.parametrize("case", TO_ONE, ids=load_case_id)
def test_one_rank_goes_on_from_it(saved: Saved, loaded_on_one: Found[LoadCase], case: LoadCase) -> None:
    check(loaded_on_one[case], saved, case)


def test_a_mesh_is_read_whole_without_processes(saved: Saved) -> None:
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
