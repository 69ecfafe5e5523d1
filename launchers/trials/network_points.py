"""The points of `bench_network.py`: what the ranks of a job noted, as numbers per step, and the table of them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import chain, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from trials.pacer import Plan, Segment

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Point:
    """One setting at one rate; numbers are of one host, the mean over hosts, and None where nothing was measured."""

    setting: str
    hosts: int
    mbit_per_s: float | None
    """Of each host's link, each way; None is no limit."""
    repetition: int
    status: str
    """"ok", or "refused: ..." or "failed: ..." with the reason."""
    steps: int = 0
    tokens_per_s: float | None = None
    """Of all hosts together."""
    step_s: float | None = None
    """The mean, syncs included."""
    median_step_s: float | None = None
    """Where most steps have no sync: of a step without one."""
    blocked_s: float | None = None
    """Of a step, in communication across replicas, where the run says so."""
    tx_bytes: float | None = None
    """Over the interface in a step, with all headers, less what a pausing job sends in that time; so is rx_bytes."""
    rx_bytes: float | None = None
    ledger_bytes: float | None = None
    """What the run says that it sent in a step."""
    ledger_share: float | None = None
    """ledger_bytes / tx_bytes."""
    idle_bytes_per_s: float | None = None
    queued_s: float | None = None
    """Of a step, for which a rank's main thread was ready to run and had no core: how crowded the machine was."""
    others_threads: float | None = None
    """Threads of other programs that ran or waited for a core while the job paused."""

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def points_of(
    setting: str, plan: Plan, rows: list[Rows], error: str, repetition: int, others_threads: float
) -> list[Point]:
    """A point for each segment, those that a job did not come to with its error."""
    points = []
    for number, segment in enumerate(plan.segments):
        head: dict[str, Any] = {"setting": setting, "hosts": len(rows), "mbit_per_s": segment.mbit_per_s}
        head |= {"repetition": repetition, "others_threads": None if math.isnan(others_threads) else others_threads}
        found = [_measured(one, number, plan.starts[number], segment) for one in rows]
        measured = [one for one in found if one is not None]
        if len(measured) < len(rows) or not rows:
            points.append(Point(**head, status=error or "failed: the ranks noted too few steps"))
        else:
            points.append(Point(**head, status="ok", **_numbers(measured)))
    return points


@dataclass(frozen=True)
class _Measured:
    """One rank's segment: its first and last note, and what the steps between them say."""

    first: dict[str, Any]
    last: dict[str, Any]
    steps: Rows
    tokens: int
    idle: dict[str, float]
    """Bytes per second, by counter."""


def _measured(rows: Rows, number: int, steps_before: int, segment: Segment) -> _Measured | None:
    released = [row for row in rows if row.get("segment") == number]
    made = {row["step"]: row for row in rows if "step" in row}
    first_step, last_step = steps_before + segment.settle_steps, steps_before + segment.steps
    wanted = range(first_step + 1, last_step + 1)
    if not released or first_step not in made or not all(step in made for step in wanted):
        return None
    first = made[first_step] if segment.settle_steps else released[0]
    tokens = made[last_step]["tokens"] - made[first_step]["tokens"]
    return _Measured(first, made[last_step], [made[step] for step in wanted], tokens, _idle(rows))


def _idle(rows: Rows) -> dict[str, float]:
    """From the first pause: all later ones may still have something under way."""
    pause = next(row for row in rows if "segment" in row)
    seconds = pause["time"] - pause["quiet_time"]
    return {key: (pause[key] - pause[f"quiet_{key}"]) / seconds for key in ("tx_bytes", "rx_bytes")}


def _numbers(ranks: list[_Measured]) -> dict[str, Any]:
    steps = len(ranks[0].steps)
    seconds = max(one.last["time"] for one in ranks) - min(one.first["time"] for one in ranks)

    def traffic(key: str) -> float:
        return fmean(max(0.0, one.last[key] - one.first[key] - one.idle[key] * seconds) for one in ranks) / steps

    def said(key: str) -> float | None:
        values = [row.get(key) for one in ranks for row in one.steps]
        return None if None in values else math.fsum(values) / len(ranks) / steps

    queued = [(one.first.get("queued_s"), one.last.get("queued_s")) for one in ranks]
    tx_bytes, ledger_bytes = traffic("tx_bytes"), said("ledger_bytes")
    return {
        "steps": steps,
        "tokens_per_s": ranks[0].tokens / seconds,
        "step_s": seconds / steps,
        "median_step_s": fmean(median(_step_seconds(one)) for one in ranks),
        "blocked_s": said("blocked_s"),
        "tx_bytes": tx_bytes,
        "rx_bytes": traffic("rx_bytes"),
        "ledger_bytes": ledger_bytes,
        "ledger_share": ledger_bytes / tx_bytes if ledger_bytes is not None and tx_bytes else None,
        "idle_bytes_per_s": fmean(one.idle["tx_bytes"] for one in ranks),
        "queued_s": None if None in chain(*queued) else fmean(last - first for first, last in queued) / steps,
    }


def _step_seconds(one: _Measured) -> list[float]:
    times = [one.first["time"], *(row["time"] for row in one.steps)]
    return [stop - start for start, stop in pairwise(times)]


def refused_points(
    setting: str, hosts: int, rates: Iterable[float | None], repetition: int, status: str
) -> list[Point]:
    """Of a setting for which nothing was started."""
    return [Point(setting, hosts, rate, repetition, status) for rate in rates]


def middle(points: Iterable[Point], key: str) -> float | None:
    """The median over those points that have the number."""
    values = [value for point in points if (value := getattr(point, key)) is not None]
    return median(values) if values else None


# -- the file ----------------------------------------------------------------------------------------


def write_points(path: Path, points: list[Point], facts: dict[str, str]) -> None:
    """A CSV; `facts` are columns with the same value in every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*(field.name for field in fields(Point)), *facts], lineterminator="\n")
        writer.writeheader()
        for point in points:
            writer.writerow({**{key: _cell(value) for key, value in asdict(point).items()}, **facts})


def read_points(path: Path) -> list[Point]:
    """What `write_points` wrote."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [Point(**{field.name: _value(field.name, row[field.name]) for field in fields(Point)}) for row in
                csv.DictReader(stream)]  # fmt: skip


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _value(name: str, cell: str) -> Any:
    if name in ("setting", "status"):
        return cell
    if name in ("hosts", "repetition", "steps"):
        return int(cell)
    return float(cell) if cell else None
