"""A run goes on from what another layout saved: replicas, shards, ZeRO stages, precisions, ranks; plain engine."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lordo_ds
from lordo_ds.checkpoint import ReshapedRun, open_run
from lordo_ds.checkpoint.portable import write_portable
from lordo_ds.errors import CheckpointError
from tests.cases import Found, run_cases
from tests.engines import GivenGradients, make_engine, settings, train_step, weights
from tests.ranks import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]

KEYS = {"preset": "recommended", "error_feedback": "fp32", "average_dense_moments": True}
SYNC, BETWEEN, END = 3, 4, 7
SAVED = [(0, "fp32"), (0, "bf16"), (1, "fp16"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")]
SCHEDULE = {"type": "WarmupLR", "params": {"warmup_num_steps": 20}}


def config(stage: int, dtype: str, replica_size: int, **optimizer: Any) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    optimizer = {**KEYS, "replica_size": replica_size, **optimizer}
    return settings(dtype, optimizer, zero_optimization=zero, scheduler=SCHEDULE)


def name_of(stage: int, dtype: str) -> str:
    return f"{dtype}_{stage}"


def replica(engine: Any) -> int:
    return lordo_ds.hook(engine).replica_index  # type: ignore[union-attr]


def save(path: str, stage: int, dtype: str) -> dict[int, dict[str, Tensor]]:
    """2 replicas of 2 shards; what each holds by step. Gradients are a replica's, the same on its shards."""
    engine = make_engine(config(stage, dtype, 2))
    at = {}
    for step in range(1, END + 1):
        train_step(engine, step, replica(engine))
        if step in (SYNC, BETWEEN):
            engine.save_checkpoint(path, client_state={"samples": 4 * step})
        at[step] = weights(engine)
    engine.destroy()
    return at


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found[str]]:
    folder = tmp_path_factory.mktemp("saved")
    cases = {name_of(*case): (str(folder / name_of(*case)), *case) for case in SAVED}
    return folder, run_cases(save, 4, cases, timeout_s=240)


# -- reading without processes -----------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "dtype"), SAVED)
def test_a_saved_run_is_read_whole_without_processes(saved: Any, stage: int, dtype: str) -> None:
    folder, ranks = saved[0], saved[1][name_of(stage, dtype)]
    for step in (SYNC, BETWEEN):
        run = open_run(folder / name_of(stage, dtype), f"global_step{step}")
        assert run.replicas == 2 and run.synced == (step == SYNC)
        for m in range(2):
            assert run.counters(m).attempted_steps == step and run.engine_state(m).client_state == {"samples": 4 * step}
            for name, weight in ranks[2 * m][step].items():
                assert torch.equal(run.state(name, m)["weight"], weight), (name, m)


def test_every_stage_saves_the_same_whole_state(saved: Any) -> None:
    folder, found = saved
    assert all(found[name_of(stage, "fp32")] for stage in (0, 2, 3))
    runs = [open_run(folder / name_of(stage, "fp32"), f"global_step{BETWEEN}") for stage in (0, 2, 3)]
    for name in runs[0].parameters:
        for m in range(2):
            expected, *others = (run.state(name, m) for run in runs)
            for other in others:
                assert other.keys() == expected.keys()
                for key, value in expected.items():
                    if isinstance(value, Tensor):
                        assert value.shape == other[key].shape and value.dtype == other[key].dtype, (name, key)
                        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=5e-5)
                    else:
                        assert other[key] == value


# -- loading into another layout ---------------------------------------------------------------------


def load_and_go_on(path: str, step: int, into: tuple[int, str, int], **optimizer: Any) -> dict[str, Any]:
    """Weights right after loading and at the end, by replica."""
    engine = make_engine(config(*into, **optimizer), GivenGradients(scale=3.0))
    tag = f"global_step{step}" if os.path.isdir(os.path.join(path, f"global_step{step}")) else None
    _, client = lordo_ds.load_checkpoint(engine, path, tag, reshape=True)
    found = {"client": client, "after": weights(engine), "steps": engine.global_steps, "replica": replica(engine)}
    found["model"] = {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}
    for now in range(step + 1, END + 1):
        train_step(engine, now, replica(engine))
    found["end"], found["status"] = weights(engine), lordo_ds.status(engine)
    engine.destroy()
    return found


LoadCase = tuple[str, int, tuple[int, str, int]]  # what was saved, at which step, and the layout that loads it


def load_all(saved: tuple[Path, Found[str]], world_size: int, cases: list[LoadCase]) -> Found[LoadCase]:
    """Of what could be saved."""
    chosen = {case: (str(saved[0] / case[0]), *case[1:]) for case in cases if saved[1].ran(case[0])}
    return run_cases(load_and_go_on, world_size, chosen, timeout_s=240)


SAME_REPLICAS = [
    # 2 replicas of 2 shards in another stage or precision of the masters
    (name_of(0, "fp32"), SYNC, (3, "fp32", 2)),
    (name_of(3, "fp32"), BETWEEN, (0, "fp32", 2)),
    (name_of(3, "fp32"), BETWEEN, (1, "fp32", 2)),
    (name_of(2, "fp32"), BETWEEN, (3, "fp32", 2)),
    (name_of(0, "fp32"), BETWEEN, (2, "fp32", 2)),
    (name_of(2, "fp32"), BETWEEN, (2, "fp32", 2)),
]
TWO_RANKS = [
    # 2 replicas of one shard: exact at any step
    (name_of(2, "fp32"), BETWEEN, (0, "fp32", 1)),
    (name_of(3, "fp32"), SYNC, (1, "fp32", 1)),
    # 1 replica of 2 shards
    (name_of(0, "fp32"), SYNC, (3, "fp32", 2)),
    (name_of(3, "bf16"), SYNC, (1, "bf16", 2)),
    (name_of(1, "fp16"), BETWEEN, (2, "fp32", 2)),
    (name_of(1, "bf16"), BETWEEN, (0, "bf16", 2)),
]


def expected_weights(ranks: list[Any], step: int, m: int, replicas: int) -> dict[str, Tensor]:
    """What replica m of `replicas` starts with: its own where they are as many, else the mean, all equal at a sync."""
    own = [ranks[2 * index][step] for index in range(2)]
    if replicas == 2:
        return own[m]
    return {key: ((one.double() + own[1][key].double()) / 2).to(one.dtype) for key, one in own[0].items()}


def check_loaded(found: list[dict[str, Any]], case: LoadCase, ranks: list[Any]) -> None:
    name, step, into = case
    for one in found:
        replicas = len(found) // into[2]
        expected = expected_weights(ranks, step, one["replica"], replicas)
        assert one["client"] == {"samples": 4 * step} and one["steps"] == step
        assert one["status"]["replicas"] == replicas and one["status"]["step"] == END
        for key, weight in one["after"].items():
            assert torch.equal(weight, expected[key]), key
        for weight in one["end"].values():
            assert bool(torch.isfinite(weight).all())
        if replicas == 2 and "fp32" in name:  # the same replicas with the same gradients
            straight = ranks[2 * one["replica"]][END]
            for key, weight in one["end"].items():
                assert float((weight - straight[key]).abs().max()) < 2e-5, key


def load_case_id(case: LoadCase) -> str:
    name, step, (stage, dtype, replica_size) = case
    return f"{name}-step{step}-into-{name_of(stage, dtype)}-of-{replica_size}"


@pytest.fixture(scope="module")
def loaded_on_four(saved: Any) -> Found[LoadCase]:
    return load_all(saved, 4, SAME_REPLICAS)


@pytest.fixture(scope="module")
def loaded_on_two(saved: Any) -> Found[LoadCase]:
    return load_all(saved, 2, TWO_RANKS)


@pytest.mark.parametrize("case", SAME_REPLICAS, ids=load_case_id)
def test_other_stages_go_on_from_it(saved: Any, loaded_on_four: Found[LoadCase], case: LoadCase) -> None:
    ranks = saved[1][case[0]]
    found = loaded_on_four[case]
    check_loaded(found, case, ranks)
    for key, weight in found[0]["model"].items():
        assert weight.numel() == 0 or torch.equal(weight, found[0]["after"][key]), key


@pytest.mark.parametrize("case", TWO_RANKS, ids=load_case_id)
def test_fewer_ranks_go_on_from_it(saved: Any, loaded_on_two: Found[LoadCase], case: LoadCase) -> None:
    ranks = saved[1][case[0]]
    check_loaded(loaded_on_two[case], case, ranks)


def test_one_rank_and_then_four_replicas_go_on_from_it(saved: Any, tmp_path: Path) -> None:
    """2 -> 1 -> 4 replicas at a sync: the weights stay the same to the bit."""
    name = name_of(3, "fp32")
    folder, ranks = saved[0], saved[1][name]
    run_ranks(loaded_and_saved, 1, str(folder / name), f"global_step{SYNC}", (0, "fp32", 1), str(tmp_path))
    for stage in (0, 2):
        for one in run_ranks(load_and_go_on, 4, str(tmp_path), SYNC, (stage, "fp32", 1)):
            assert one["status"]["replicas"] == 4
            for key, weight in one["after"].items():
                assert torch.equal(weight, ranks[0][SYNC][key]), key


def loaded_and_saved(path: str, tag: str, into: tuple[int, str, int], target: str) -> None:
    engine = make_engine(config(*into), GivenGradients(scale=3.0))
    _, client = lordo_ds.load_checkpoint(engine, path, tag, reshape=True)
    lordo_ds.save_checkpoint(engine, target, client_state=client)
    engine.destroy()


def ranks_changed(path: str) -> list[dict[str, Any]]:
    return [load_and_go_on(path, SYNC, (2, "fp32", 2), rank=rank) for rank in (2, 4, "1/2")]


def test_the_rank_shrinks_and_grows(saved: Any) -> None:
    name = name_of(2, "fp32")
    ranks = saved[1][name]
    for found in run_ranks(ranks_changed, 4, str(saved[0] / name), timeout_s=120):
        for one in found:
            for key, weight in one["after"].items():
                assert torch.equal(weight, ranks[0][SYNC][key]), key
            for key, weight in one["end"].items():
                straight = ranks[2 * one["replica"]][END][key]
                assert float((weight - straight).abs().max()) < 0.1, "as far as a few steps reach"


def portable_loaded(path: str) -> list[dict[str, Any]]:
    return [load_and_go_on(path, BETWEEN, (stage, "fp32", 2)) for stage in (0, 3)]


def test_a_portable_checkpoint_loads_into_any_layout(saved: Any, tmp_path: Path) -> None:
    name = name_of(1, "bf16")
    folder, ranks = saved[0], saved[1][name]
    run = open_run(folder / name, f"global_step{BETWEEN}")
    write_portable(run, tmp_path / "portable")
    portable = open_run(tmp_path / "portable")
    assert portable.parameters == run.parameters and portable.replicas == 2
    for key in run.parameters:
        for m in range(2):
            one, other = run.state(key, m), portable.state(key, m)
            assert one.keys() == other.keys()
            assert all(torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k] for k, v in one.items())
    for found in run_ranks(portable_loaded, 4, str(tmp_path / "portable"), timeout_s=120):
        for one in found:
            for key, weight in one["after"].items():
                assert torch.equal(weight, ranks[2 * one["replica"]][BETWEEN][key]), key


def test_between_syncs_other_replicas_start_from_the_mean_and_are_told(saved: Any) -> None:
    assert saved[1][name_of(2, "fp32")]
    run = open_run(saved[0] / name_of(2, "fp32"), f"global_step{BETWEEN}")
    assert not ReshapedRun(run, 2).notes
    assert (
        "step 4 is between syncs: the 1 replicas start from the mean of the weights of 2"
        in ReshapedRun(run, 1).notes[0]
    )
    at_sync = open_run(saved[0] / name_of(2, "fp32"), f"global_step{SYNC}")
    assert not ReshapedRun(at_sync, 1).notes


# -- refusals ----------------------------------------------------------------------------------------


# the configuration that loads, with reshape=True or not, and a part of the message
REFUSED: dict[str, tuple[dict[str, Any], bool, str]] = {
    "stage": (config(3, "fp32", 2), False, "ZeRO stage: saved 2, this run 3"),
    "precision": (config(2, "bf16", 2), False, "precision: saved 'fp32', this run 'bf16'"),
    "replicas": (config(2, "fp32", 4), False, "holds the replicas [0, 1], this run has 1"),
    "rank": (config(2, "fp32", 2, rank=2), False, "subspace rank of "),
    "error feedback": (
        config(2, "fp32", 2, error_feedback=False),
        False,
        "optimizer.params.error_feedback: saved 'fp32', this run False",
    ),
    "projection": (
        config(2, "fp32", 2, low_rank={"exclude": ["wide"]}),
        True,
        "projection of wide: saved True, this run False",
    ),
}


def refusal(path: str, case: str) -> str:
    settings_, reshape, _ = REFUSED[case]
    engine = make_engine(copy.deepcopy(settings_), GivenGradients(scale=3.0))
    before = weights(engine)
    with pytest.raises(ValueError) as caught:
        lordo_ds.load_checkpoint(engine, path, f"global_step{SYNC}", reshape=reshape)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())
    assert "\n" not in str(caught.value)
    engine.destroy()
    return f"{type(caught.value).__name__} {caught.value}"


@pytest.fixture(scope="module")
def refusals(saved: Any) -> Found[str]:
    folder, found = saved
    name = name_of(2, "fp32")
    assert found[name]
    return run_cases(refusal, 4, {case: (str(folder / name), case) for case in REFUSED}, timeout_s=120)


@pytest.mark.parametrize("case", REFUSED)
def test_another_layout_is_refused_on_all_ranks_with_the_difference(refusals: Found[str], case: str) -> None:
    for message in refusals[case]:
        assert message.startswith(CheckpointError.__name__) and REFUSED[case][2] in message, message
        assert "reshape=True" in message or case == "projection"


# -- what is not trained -----------------------------------------------------------------------------


class PartlyFrozen(GivenGradients):
    """A frozen matrix and a buffer beside the trained parameters."""

    def __init__(self, value: float, scale: float = 1.0) -> None:
        super().__init__(scale)
        self.frozen = torch.nn.Parameter(torch.arange(15.0).view(5, 3) * value, requires_grad=False)
        self.register_buffer("count", torch.full((2,), value))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return super().forward({**gradients, "frozen": torch.zeros(5, 3)})


def frozen_saved_and_loaded(folder: str) -> dict[str, Any]:
    import deepspeed

    found = {}
    for stage, into in ((0, 3), (3, 0), (2, 3), (3, 1)):
        engine = make_engine(config(stage, "fp32", 2), PartlyFrozen(2.0))
        train_step(engine, 1)
        engine.save_checkpoint(os.path.join(folder, str(stage)))
        engine.destroy()
        other = make_engine(config(into, "fp32", 2), PartlyFrozen(5.0, scale=3.0))
        lordo_ds.load_checkpoint(other, os.path.join(folder, str(stage)), reshape=True)
        train_step(other, 2)
        with deepspeed.zero.GatheredParameters([other.module.frozen], enabled=into == 3):
            found[f"{stage} {into}"] = other.module.frozen.detach().clone(), other.module.count.clone()
        other.destroy()
    return found


def test_frozen_parameters_and_buffers_go_along(tmp_path: Path) -> None:
    expected = PartlyFrozen(2.0)
    for found in run_ranks(frozen_saved_and_loaded, 2, str(tmp_path)):
        for case, (frozen, count) in found.items():
            assert torch.equal(frozen, expected.frozen) and torch.equal(count, expected.count), case
    run = open_run(tmp_path / "3")
    assert torch.equal(run.untrained(0)["frozen"], expected.frozen)
