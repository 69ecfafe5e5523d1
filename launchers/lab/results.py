"""results.csv: one finished run a line, appended under a lock; the only thing that reports read."""

from __future__ import annotations

import csv
import hashlib
import math
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trials.machine import ROOT, git, processor

COLUMNS = (
    "id", "cell", "claim", "method", "model", "seed", "lr", "val_loss", "diverged", "bytes", "state_bytes",
    "host_state_bytes", "tokens", "rank", "K", "M", "B", "steps", "omega", "beta1", "qh_mode", "projection",
    "sync_warmup_steps", "bytes_ddp", "train_loss", "unigram_loss", "bigram_loss", "overlap", "captured_energy",
    "drift", "change_effective_rank", "outside", "attention_stable_rank", "attention_spectral_gap",
    "attention_change_stable_rank", "attention_change_gap_at_rank", "wall_s", "commit", "code", "machine", "config",
    "curve",
)  # fmt: skip
NUMBERS = frozenset(COLUMNS) - {
    "id", "cell", "claim", "method", "model", "commit", "code", "machine", "config", "curve", "qh_mode", "projection",
}  # fmt: skip
# What a second run of the same spec must give again, to the last digit.
REPEATED = ("val_loss", "train_loss", "bytes", "state_bytes", "tokens", "curve")

Row = dict[str, Any]


class ResultsError(ValueError):
    """A results file that cannot be used; the message is one line for the user."""


def read_rows(path: Path) -> list[Row]:
    """All rows, numbers as numbers (an empty field is NaN); none where there is no file.

    Raises:
        ResultsError: other columns.
    """
    if not path.exists():
        return []
    csv.field_size_limit(1 << 24)
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ResultsError(f"{path}: other columns than this version writes; give another --output")
        rows = [row for row in reader if row.get("curve")]  # a line that was cut off has none
    return [{key: _number(value) if key in NUMBERS else value for key, value in row.items()} for row in rows]


def append_row(path: Path, row: Row) -> None:
    """Add one line; the file and its head come with the first."""
    _write(path, [row], "a")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """A file of these rows and no others, whole or as before; what `read_rows` read is written as it was."""
    from lordo_ds.disk import flush_file, part_of

    _write(part_of(path), rows, "w")
    flush_file(part_of(path))
    os.replace(part_of(path), path)


def _write(path: Path, rows: Iterable[Row], mode: str) -> None:
    with path.open(mode, newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if stream.tell() == 0:
            writer.writeheader()
        writer.writerows({key: _text(row.get(key, "")) for key in COLUMNS} for row in rows)


def _number(text: str) -> float | int:
    if not text:
        return math.nan
    try:
        return int(text)
    except ValueError:
        return float(text)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return str(value)


def provenance(device: str) -> Row:
    """Commit (with + where the tree differs from it), a digest of the code that decides numbers, and the machine."""
    import torch

    commit = git("rev-parse", "--short", "HEAD") or "none"
    changed = git("status", "--porcelain", "--", "lordo_ds", "launchers")
    chip = torch.cuda.get_device_name() if device.startswith("cuda") else processor()
    machine = f"{chip}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    return {"commit": commit + ("+" if changed else ""), "code": code_digest(), "machine": machine}


def code_digest(root: Path = ROOT) -> str:
    """Of the sources that a run's numbers come from."""
    files: Iterable[Path] = [
        *sorted((root / "lordo_ds" / "core").rglob("*.py")),
        *(file for room in ("comm", "replica", "sync") for file in sorted((root / "lordo_ds" / room).glob("*.py"))),
        root / "lordo_ds" / "optimizer.py",
        root / "lordo_ds" / "config.py",
        *(root / "launchers" / "lab" / f"{part}.py" for part in ("data", "model", "replicas", "run")),
    ]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10]
