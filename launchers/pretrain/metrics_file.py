"""metrics.jsonl: one JSON object per step, read back when a run goes on, up to where a crash has damaged it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Numbers that whoever reads rows again counts with; those that can be NaN are written as null.
_COUNTS = ("step", "samples", "tokens", "bytes_replica", "bytes_ddp")
_VALUES = ("loss", "lr", "grad_norm", "tokens_per_s")


def read_rows(path: Path, step: int) -> tuple[list[Row], str]:
    """The rows up to a step, and what is wrong with the first line that is none ("" if all are there).

    Rows after it are lost with it: a run that goes on writes its own from `step` on.
    """
    rows: list[Row] = []
    if not step:
        return rows, ""
    if not path.exists():
        return rows, "it is not there"
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if rows and rows[-1]["step"] >= step:
                break
            row, why = _row_of(line)
            if not why and rows and row["step"] <= rows[-1]["step"]:
                why = f"its step {row['step']} comes after {rows[-1]['step']}"
            if why:
                return rows, f"line {number} is damaged ({why})"
            if row["step"] > step:
                break
            rows.append(row)
    reached = rows[-1]["step"] if rows else 0
    return rows, "" if reached == step else f"it ends at step {reached}"


def line_of(row: Row) -> str:
    """A row as it is written: JSON has no NaN and no infinity."""

    def written(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({key: written(value) for key, value in row.items()}) + "\n"


def _row_of(line: bytes) -> tuple[Row, str]:
    """A row, or why a line is none."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return {}, "no UTF-8"
    except (ValueError, RecursionError):
        return {}, "zeros" if line.strip(b"\0\n") == b"" else "no JSON, or half of it"
    if not isinstance(row, dict):
        return {}, "no JSON object"
    for key in (*_COUNTS, *_VALUES):
        kinds = (int,) if key in _COUNTS else (int, float, type(None))
        if key not in row or type(row[key]) not in kinds:
            return {}, f"{key!r} is missing" if key not in row else f"its {key!r} is no number"
    return row, ""
