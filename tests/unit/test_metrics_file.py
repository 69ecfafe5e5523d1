"""metrics.jsonl after a crash: a run that goes on takes what is whole of it, says what is lost, and never fails."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
from pretrain.run_log import RunLog  # noqa: E402
from tests.disk import disk_calls  # noqa: E402

STEPS = 8


def row(step: int, /, **changes: Any) -> dict[str, Any]:
    numbers = {"step": step, "samples": 4 * step, "tokens": 128 * step, "bytes_replica": 10, "bytes_ddp": 20}
    return {**numbers, "loss": 2.0, "lr": 0.1, "grad_norm": None, "tokens_per_s": 1e4, "synced": True, **changes}


def line(step: int, /, **changes: Any) -> bytes:
    return json.dumps(row(step, **changes)).encode() + b"\n"


def lines() -> list[bytes]:
    return [line(step) for step in range(1, STEPS + 1)]


DAMAGES = {
    "zeros": b"\0" * 300 + b"\n",
    "no UTF-8": b'{"step": 5, "\xff\xfe": 1}\n',
    "half of it": line(5)[:40] + b"\n",
    "half of it, glued to the next": line(5)[:40],
    "'step' is missing": b'{"loss": 1.0, "samples": 1}\n',
    "'bytes_ddp' is missing": json.dumps({k: v for k, v in row(5).items() if k != "bytes_ddp"}).encode() + b"\n",
    "its 'step' is no number": line(5, step="5"),
    "its 'loss' is no number": line(5, loss=[1]),
    "its 'tokens' is no number": line(5, tokens=True),
    "no JSON object": b"[1, 2]\n",
    "comes after 4": line(3),
    "half of it, nested": b"[" * 100_000 + b"\n",
    "half of it, a number of many digits": b'{"step": ' + b"9" * 5000 + b"}\n",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_row_is_where_the_rows_are_cut(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = lines()
    damaged[4] = DAMAGES[name]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(damaged))
    log = RunLog(tmp_path, True, None, STEPS, [])
    assert [one["step"] for one in log.rows] == [1, 2, 3, 4] and log.total("bytes_ddp") == 80
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines()[:4])
    said = capsys.readouterr().out
    assert "metrics.jsonl: line 5 is damaged (" in said and name.partition(",")[0] in said
    assert "of the 8 rows before the checkpoint those up to step 4 are kept" in said
    RunLog(tmp_path, True, None, 4, [])  # and again, from what was kept
    assert not capsys.readouterr().out


def test_rows_that_are_missing_are_told_and_those_after_the_checkpoint_are_nobodys_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(lines()[:6]) + line(7)[:20])
    assert len(RunLog(tmp_path, True, None, 6, []).rows) == 6 and not capsys.readouterr().out
    path.write_bytes(b"".join(lines()[:6]) + line(7)[:20])
    assert len(RunLog(tmp_path, True, None, 8, [row(8)]).rows) == 6  # step 8 waits for its averages
    assert "line 7 is damaged" in capsys.readouterr().out
    path.write_bytes(b"".join(lines()[:2]))
    assert len(RunLog(tmp_path, True, None, 8, []).rows) == 2 and "it ends at step 2" in capsys.readouterr().out
    path.unlink()
    assert not RunLog(tmp_path, True, None, 8, []).rows and "none is kept" in capsys.readouterr().out


def test_a_new_run_leaves_the_rows_of_an_earlier_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics_of_earlier_run.jsonl", "metrics_of_earlier_run_2.jsonl"):
        (tmp_path / "metrics.jsonl").write_bytes(line(len(name)))
        RunLog(tmp_path, True, None, 0, [])
        assert f"it is now {name}" in capsys.readouterr().out
        assert (tmp_path / name).read_bytes() == line(len(name)) and not (tmp_path / "metrics.jsonl").read_bytes()
    RunLog(tmp_path, True, None, 0, [])
    assert not capsys.readouterr().out


def test_the_rows_are_on_the_disk_when_asked_for(tmp_path: Path) -> None:
    class Monitor:
        def write_events(self, events: list[Any]) -> None:
            pass

    log = RunLog(tmp_path, True, Monitor(), 0, [])
    log.add(row(1, grad_norm=math.nan))
    log.flush([{"loss": 1.5}])
    with disk_calls() as events:
        log.put_on_disk()
    assert [call[1:] for call in events] == [("fsync", str(tmp_path / "metrics.jsonl"))]
    assert RunLog(tmp_path, True, None, 1, []).rows == [row(1, loss=1.5)]
