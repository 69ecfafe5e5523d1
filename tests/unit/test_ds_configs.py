"""The DeepSpeed settings that come: valid, and alike in everything that is not what they compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lordo_ds import LordoConfig

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ds"
BASELINES = ("adamw_ddp", "low_rank_ddp", "low_rank_ddp_weak", "local_adamw", "diloco")


def read(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{name}.json").read_text()))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_settings_are_valid(path: Path) -> None:
    optimizer = json.loads(path.read_text())["optimizer"]
    if optimizer["type"] == "LoRDO":
        LordoConfig.parse(optimizer["params"])
    else:
        assert optimizer["type"] == "AdamW" and optimizer["params"]["torch_adam"], "no CUDA build for a baseline"


@pytest.mark.parametrize("name", [*BASELINES, "lordo_paper"])
def test_all_differ_from_lordo_in_the_optimizer_only(name: str) -> None:
    ours, other = read("lordo"), read(name)
    shared = ("betas", "eps", "weight_decay")
    assert all(other["optimizer"]["params"][key] == ours["optimizer"]["params"][key] for key in shared)
    # An outer momentum of .7 with an outer rate of .7 multiplies the step by .7 / (1 - .7).
    factor = 0.5 if name == "diloco" else 1.0
    assert other["optimizer"]["params"]["lr"] == factor * ours["optimizer"]["params"]["lr"]
    del ours["optimizer"], other["optimizer"]
    assert other == ours


@pytest.mark.parametrize("name", ["lordo", "adamw_ddp"])
def test_bf16_is_the_only_change_of_a_bf16_variant(name: str) -> None:
    assert read(f"{name}_bf16") == {**read(name), "bf16": {"enabled": True}}


def test_a_node_is_a_replica_in_the_settings_for_several_nodes() -> None:
    nodes, ours = read("lordo_nodes"), read("lordo_bf16")
    params = nodes["optimizer"]["params"]
    assert params.pop("replica_size") == "node" and params.pop("pseudo_gradient_dtype") == "bf16"
    assert ours["optimizer"]["params"].pop("replica_size") == 1
    assert nodes["zero_optimization"] == {"stage": 1} and nodes["scheduler"]["params"]["total_num_steps"] >= 10_000
    for key in ("zero_optimization", "scheduler"):
        del nodes[key], ours[key]
    assert nodes == ours


@pytest.mark.parametrize(("name", "preset"), [("lordo", "recommended"), ("lordo_paper", "paper")])
def test_lordo_has_an_eighth_of_the_rank_and_a_sync_every_32_steps(name: str, preset: str) -> None:
    params = read(name)["optimizer"]["params"]
    config = LordoConfig.parse(params)
    assert (config.preset, config.rank, config.sync_interval, config.replica_size) == (preset, "1/8", 32, 1)
    assert config.sync_warmup_steps == 0 and config.outer == LordoConfig.parse({"preset": preset}).outer
    assert "train_batch_size" not in read("lordo"), "any number of ranks must fit"
