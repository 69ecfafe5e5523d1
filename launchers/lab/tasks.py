"""Held-out tasks for runs that have been made: chosen ones again, with `lab.questions` at their end."""

from __future__ import annotations

import csv
import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.questions import TASKS
from lab.results import Row

ITEMS = 1000
COLUMNS = (
    "id",
    "cell",
    "method",
    "seed",
    "lr",
    "val_loss",
    "items",
    *(f"{t}{c}" for t in TASKS for c in ("", "_chance")),
)


def read_tasks(path: Path) -> list[dict[str, Any]]:
    """Rows of a tasks file, numbers as numbers; none where there is no file."""
    if not path.exists():
        return []
    names = ("id", "cell", "method")
    with path.open(newline="", encoding="utf-8") as stream:
        return [{k: v if k in names else float(v) for k, v in row.items()} for row in csv.DictReader(stream)]


def run_tasks(rows: list[Row], path: Path, jobs: int, device: str, say: Callable[[str], None]) -> int:
    """Train these rows' runs again, as they were, and answer the tasks; what `path` holds is not run again.

    Returns:
        How many of them did not end with the loss that their row says. They are left out.
    """
    done = {row["id"] for row in read_tasks(path)}
    left = [row for row in rows if row["id"] not in done]
    odd = 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "lab.run"])  # once for all runs
    with context.Pool(jobs, maxtasksperchild=1) as pool, path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if not done and stream.tell() == 0:
            writer.writeheader()
        for row, again in pool.imap_unordered(_again, [(row, device, ITEMS) for row in left]):
            if again["val_loss"] != row["val_loss"]:
                odd += 1
                say(f"{row['id']} ({row['method']}): loss {again['val_loss']} now, {row['val_loss']} then: left out")
                continue
            kept = {key: row[key] for key in ("id", "cell", "method", "seed", "lr", "val_loss")}
            writer.writerow({**kept, "items": ITEMS, **again["tasks"]})
            stream.flush()
            say(f"{row['id']} ({row['method']}, seed {row['seed']}): " + _in_words(again["tasks"]))
    return odd


def _again(given: tuple[Row, str, int]) -> tuple[Row, dict[str, Any]]:
    from lab.run import execute
    from lab.spec import RunSpec

    logging.getLogger("lordo_ds").setLevel(logging.ERROR)
    row, device, items = given
    return row, execute(RunSpec.from_json(row["config"]), device, items)


def _in_words(found: dict[str, float]) -> str:
    return ", ".join(f"{task} {found[task]:.3f}" for task in TASKS)
