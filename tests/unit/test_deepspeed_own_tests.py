"""launchers/deepspeed_own_tests.py: what it changes in a configuration, and what its table says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "launchers"))

import _deepspeed_tests_plugin as plugin  # noqa: E402
import deepspeed_own_tests as tool  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(plugin.VARIABLE, json.dumps({"folder": str(tmp_path)}))
    return tmp_path


def with_optimizer(**block: Any) -> dict[str, Any]:
    return {"train_batch_size": 2, "optimizer": block}


def test_only_the_optimizer_block_of_adam_changes(folder: Path) -> None:
    adam = with_optimizer(type="AdamW", params={"lr": 0.1, "betas": [0.8, 0.9], "adam_w_mode": True})
    before = json.dumps(adam)
    changed = plugin.rewritten(adam, {"optimizer": "LoRDO", "params": {"rank": 4}})
    assert changed == with_optimizer(type="LoRDO", params={"lr": 0.1, "betas": [0.8, 0.9], "rank": 4})
    assert plugin.rewritten(adam, {"optimizer": "Adam"})["optimizer"]["params"]["torch_adam"]
    assert json.dumps(adam) == before
    assert len(tool.read(folder / "replaced.jsonl")) == 2


@pytest.mark.parametrize("config", [{}, with_optimizer(type="SGD"), with_optimizer(type="OneBitAdam"), "ds.json", None])
def test_a_configuration_without_adam_stays(folder: Path, config: Any) -> None:
    assert plugin.rewritten(config, {"optimizer": "LoRDO", "params": {}}) is config
    assert not tool.read(folder / "replaced.jsonl")


def test_nested_states_are_compared_key_by_key() -> None:
    assert plugin.flat({"weight": {"exp_avg": 1, "step": 2}, "lr": 3}) == {
        "weight/exp_avg": 1,
        "weight/step": 2,
        "lr": 3,
    }


def row(test: str, lordo: str, reason: str = "", asks: bool = True) -> tool.Row:
    results = {"Adam": tool.Result("passed", "c0", "")}
    if asks:
        results |= {name: tool.Result(lordo, "c0", reason) for name in ("replicas", "one replica")}
    return tool.Row(test, asks, results)


def test_a_refusal_explains_itself_and_another_difference_does_not() -> None:
    refused = row(
        "unit/a.py::test[1]", "failed", "ConfigError: LoRDO: zero_optimization.x is not supported: leave it out"
    )
    crashed = row("unit/a.py::test[2]", "failed", "KeyError: 'exp_avg'")
    rows = [refused, crashed, row("unit/a.py::test[3]", "passed"), row("unit/b.py::test", "", asks=False)]
    tool.explain(rows)
    assert refused.kind == "refused" and refused.why.endswith("is not supported: leave it out")
    assert crashed.differs and not crashed.kind
    text = tool.markdown(rows, "abc of 2026-01-01", "table")
    assert "**3 tests ask for Adam in their configuration and pass with it; 1 of them pass" in text
    assert "| unit/a.py | 3 | 3 | 1 |" in text and "1 refused, 1 unexplained" in text
    assert "Not compared: 1 does not ask for Adam." in text


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.skipif("DEEPSPEED_CHECKOUT" not in os.environ, reason="DEEPSPEED_CHECKOUT names no checkout of DeepSpeed")
def test_a_file_of_deepspeed_runs_with_both_optimizers(tmp_path: Path) -> None:
    test = "unit/runtime/zero/test_ignore_unused_parameters.py"
    script = [sys.executable, "launchers/deepspeed_own_tests.py", os.environ["DEEPSPEED_CHECKOUT"], "--tests", test]
    done = subprocess.run([*script, "--output", str(tmp_path / "table")], cwd=ROOT, timeout=280)
    assert done.returncode == 0
    assert (
        f"{test}::TestStage2IgnoreUnusedParameters::test[False],passed,passed,passed"
        in (tmp_path / "table.csv").read_text()
    )
