"""`launchers/bench_data.py` compares the same tokens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_both_sides_make_the_same_tokens_and_are_compared(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launchers" / "bench_data.py"), "--megabytes", "1", "--vocab", "1000"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ratio +\d+\.\d\d by the clock, \d+\.\d\d by the processors$", done.stdout, re.MULTILINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.jsonl", "tokenizer.model"]
