"""What a lossy wire has not said goes along into another layout, and is all there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lordo_ds
from lordo_ds.checkpoint import open_run
from lordo_ds.checkpoint.portable import write_portable
from tests.cases import run_cases
from tests.engines import GivenGradients, make_engine, settings, train_step
from tests.ranks import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]

WIRE = {"top_k": 8, "block": 64}
SAVED = {"stage 0": (0, "owner"), "stage 1": (1, "everyone"), "stage 3": (3, "owner")}
LAYOUTS = {
    "2 replicas of 2": (2, 2, "owner"),
    "4 replicas": (1, 1, "owner"),
    "2 replicas of 2 at stage 0": (0, 2, "everyone"),
    "one replica": (2, 4, "auto"),
}


def config(stage: int, replica_size: int, compute: str) -> dict[str, Any]:
    optimizer = {"preset": "recommended", "replica_size": replica_size, "pseudo_gradient_dtype": WIRE}
    optimizer["outer"] = {"compute": compute}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return settings("fp32", optimizer, zero_optimization=zero)


def replica(engine: Any) -> int:
    return lordo_ds.hook(engine).replica_index  # type: ignore[union-attr]


def save(path: str, stage: int, compute: str) -> None:
    """2 replicas of 2 ranks, two syncs and a step."""
    engine = make_engine(config(stage, 2, compute))
    for step in range(1, 8):
        train_step(engine, step, replica(engine))
    lordo_ds.save_checkpoint(engine, path)
    engine.destroy()


def load_and_save(path: str, target: str, stage: int, replica_size: int, compute: str) -> None:
    engine = make_engine(config(stage, replica_size, compute), GivenGradients(scale=3.0))
    lordo_ds.load_checkpoint(engine, path, reshape=True)
    lordo_ds.save_checkpoint(engine, target)
    train_step(engine, 8, replica(engine))
    train_step(engine, 9, replica(engine))  # a sync
    assert lordo_ds.status(engine)["last_sync"]["step"] == 9
    engine.destroy()


def kept(path: Path) -> dict[str, Tensor]:
    """Of every parameter: the outer momentum, and what is left over of the means, in all."""
    run = open_run(path)
    found = {}
    for name in run.parameters:
        states = [run.state(name, m) for m in range(run.replicas)]
        momenta = [state["owner_momentum"] for state in states if "owner_momentum" in state]
        assert ("outer_momentum" in states[0]) == (not momenta)
        found[f"{name} momentum"] = torch.stack(momenta).sum(0) if momenta else states[0]["outer_momentum"]
        if run.replicas == 1:  # it has no wire
            continue
        of_replicas = torch.stack([state["wire_error"] for state in states]).double().mean(0)
        found[name] = of_replicas + torch.stack([state["owner_error"] for state in states]).double().sum(0)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wire")
    found = run_cases(save, 4, {name: (str(folder / name), *how) for name, how in SAVED.items()})
    assert all(found.ran(name) for name in SAVED)
    return folder


def test_every_layout_is_given_all_of_it(saved: Path, tmp_path: Path) -> None:
    write_portable(open_run(saved / "stage 1"), tmp_path / "portable")
    sources = {**{name: saved / name for name in SAVED}, "portable": tmp_path / "portable"}
    cases = {
        (source, layout): (str(path), str(tmp_path / f"{source} {layout}"), *LAYOUTS[layout])
        for source, path in sources.items()
        for layout in LAYOUTS
    }
    found = run_cases(load_and_save, 4, cases, timeout_s=200)
    for source, layout in cases:
        assert found[source, layout] is not None
        before, after = kept(sources[source]), kept(tmp_path / f"{source} {layout}")
        assert sum(bool(tensor.any()) for tensor in after.values()) > len(after) // 2, "this tests nothing"
        assert len(after) == (len(before) if layout != "one replica" else len(before) // 2)
        for name, tensor in after.items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-7)


def test_the_same_layout_goes_on_bit_by_bit(saved: Path) -> None:
    for of_rank in run_ranks(go_on, 4, str(saved)):
        assert all(torch.equal(one, other) for one, other in of_rank)


def go_on(saved: str) -> list[tuple[Tensor, Tensor]]:
    found = []
    for stage, saved_with, loaded_with in (
        (1, "everyone", "everyone"),
        (3, "owner", "owner"),
        (1, "everyone", "owner"),
    ):
        ends = []
        for load in (False, True):
            compute = loaded_with if load else saved_with
            engine = make_engine(config(stage, 2, compute), GivenGradients(scale=3.0 if load else 1.0))
            if load:
                lordo_ds.load_checkpoint(engine, f"{saved}/stage {stage}")
            for step in range(8 if load else 1, 11):
                train_step(engine, step, replica(engine))
            sync = lordo_ds.hook(engine).optimizer.sync  # type: ignore[union-attr]
            if load and saved_with != loaded_with:
                assert all("owner_momentum" in item.state for item in sync.items)  # type: ignore[union-attr]
            ends.append(torch.cat([item.weight.clone() for item in sync.items]))  # type: ignore[union-attr]
            engine.destroy()
        if saved_with == loaded_with:
            found.append((ends[0], ends[1]))
    return found
