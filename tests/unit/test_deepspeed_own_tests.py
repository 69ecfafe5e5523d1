"""launchers/deepspeed_own_tests.py: what it changes in a configuration, and what its table says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed_own_tests as tool
import pytest

from trials import deepspeed_tests_plugin as plugin

ROOT = Path(__file__).resolve().parents[2]


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


def row(test: str, lordo: str, reason: str = "") -> tool.Row:
    return tool.Row(test, True, tool.Result("passed", "c0", ""), tool.Result(lordo, "c0", reason))


def test_a_refusal_explains_itself_and_another_difference_does_not() -> None:
    refused = row(
        "unit/a.py::test[1]", "failed", "ConfigError: LoRDO: zero_optimization.x is not supported: leave it out"
    )
    crashed = row("unit/a.py::test[2]", "failed", "KeyError: 'exp_avg'")
    asks_for_sgd = tool.Row("unit/b.py::test", False, tool.Result("passed", "c0", ""))
    rows = [refused, crashed, row("unit/a.py::test[3]", "passed"), asks_for_sgd]
    tool.explain(rows)
    assert refused.kind == "refused" and refused.why.endswith("is not supported: leave it out")
    assert crashed.differs and not crashed.kind
    text = tool.markdown(rows, {"rank": 4}, "abc of 2026-01-01", "table")
    assert (
        "**3 tests ask for Adam in their configuration and pass with it.\n"
        "1 of them pass with LoRDO, 2 do not:\n1 refused" in text
    )
    assert "| unit/a.py | 3 | 3 | 1 |" in text and "1 refused, 1 unexplained" in text
    assert "Not compared: 1 does not ask for Adam." in text and "3 of the results with LoRDO are of commit c0." in text


def test_an_entry_names_files_classes_and_functions() -> None:
    for entry in ("unit/a.py", "unit/a.py::TestA", "unit/a.py::TestA::test", "unit/a.py::TestA::test[1]"):
        assert tool.is_of("unit/a.py::TestA::test[1]", entry)
    for entry in ("unit/a", "unit/a.py::Test", "unit/a.py::TestA::test[", "unit/a.py::TestA::test[12]"):
        assert not tool.is_of("unit/a.py::TestA::test[1]", entry)


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.skipif("DEEPSPEED_CHECKOUT" not in os.environ, reason="DEEPSPEED_CHECKOUT names no checkout of DeepSpeed")
def test_a_file_of_deepspeed_runs_with_both_optimizers(tmp_path: Path) -> None:
    test = "unit/runtime/zero/test_ignore_unused_parameters.py"
    script = [sys.executable, "launchers/deepspeed_own_tests.py", os.environ["DEEPSPEED_CHECKOUT"], "--tests", test]
    done = subprocess.run([*script, "--output", str(tmp_path / "table")], cwd=ROOT, timeout=280)
    assert done.returncode == 0
    assert (
        f"{test}::TestStage2IgnoreUnusedParameters::test[False],passed,passed" in (tmp_path / "table.csv").read_text()
    )
