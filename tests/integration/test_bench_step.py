"""The step benchmark: its command, the file it leaves, and that what it compares trained alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
num_layers: 2
hidden_size: 32
num_attention_heads: 4
ffn_hidden_size: 64
seq_length: 16
vocab_size: 128
"""

pytestmark = [pytest.mark.deepspeed, pytest.mark.megatron, pytest.mark.timeout(180)]


def test_one_command_compares_lordo_with_adamw_and_says_where_the_numbers_come_from(tmp_path: Path) -> None:
    model, output = tmp_path / "model.yaml", tmp_path / "bench.json"
    model.write_text(MODEL)
    options = ["--processes", "1", "--stages", "1", "--steps", "6", "--model", str(model), "--output", str(output)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "launchers" / "bench_step.py"), *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert "bench_step.py" in result["command"] and result["cores"] and result["versions"]["torch"]
    (part,) = result["parts"]
    assert (part["processes"], part["stage"], part["tokens_per_process_and_step"]) == (1, 1, 16)
    found = part["contenders"]
    assert list(found) == ["torch AdamW (fused)", "DeepSpeed AdamW", "LoRDO paper", "LoRDO recommended"]
    for name, one in found.items():
        assert name in done.stdout
        assert one["losses"][0] == pytest.approx(found["DeepSpeed AdamW"]["losses"][0], rel=1e-5), "other weights"
        assert one["losses"][1] < one["losses"][0]
        assert 0 < one["optimizer_step_s"]["median"] < one["train_step_s"]["median"]
        assert one["peak_memory_bytes"] > 0
    fused, plain, *lordo = found.values()
    assert fused["losses"][1] == pytest.approx(plain["losses"][1], rel=1e-4), "the two AdamWs differ"
    assert fused["train_ratio"]["torch AdamW (fused)"]["median"] == 1.0
    for one in lordo:
        split = one["optimizer_split_s"]
        assert all(split[kind] > 0 for kind in ("project", "moments", "lift", "dense AdamW"))
        assert sum(split.values()) == pytest.approx(one["optimizer_step_s"]["median"])
        assert one["sync_s"]["sync"] > one["sync_s"]["refresh"] > 0
        assert {"exp_avg", "basis", "anchor", "dense_exp_avg"} <= set(one["state_bytes"])
    assert lordo[0]["state_bytes"]["total"] < fused["state_bytes"]["total"]


def test_a_mistake_is_one_line() -> None:
    command = [sys.executable, str(ROOT / "launchers" / "bench_step.py"), "--steps", "1", "--output", "x.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "bench_step.py: error: --steps 1: must be at least 6\n"
