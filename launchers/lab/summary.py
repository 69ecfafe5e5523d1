"""From rows to the lines of a table: the best learning rate of every cell, means and noise over seeds, differences."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from lab.grid import best_lr
from lab.results import Row


@dataclass
class Line:
    """One cell. `rows` are those at the chosen learning rate by seed; `grid` the first seed's losses by rate."""

    cell: str
    method: str
    config: dict[str, Any]
    lr: float
    grid: dict[float, float]
    rows: dict[int, Row]
    variant: str = ""
    series: dict[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> dict[int, float]:
        return {seed: row["val_loss"] for seed, row in sorted(self.rows.items())}

    @property
    def mean(self) -> float:
        return fmean(self.losses.values())

    @property
    def noise(self) -> float:
        """Standard deviation over seeds; NaN with one."""
        values = list(self.losses.values())
        return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan

    @property
    def edge(self) -> str:
        """Where the best rate is at an end of the grid, a better one may lie outside."""
        if len(self.grid) < 2:
            return "!"
        return {min(self.grid): "<", max(self.grid): ">"}.get(self.lr, "")

    def value(self, key: str) -> float:
        """Mean of a column over the seeds, what is not a number left out."""
        found = [row[key] for row in self.rows.values() if not math.isnan(row[key])]
        return fmean(found) if found else math.nan

    @property
    def name(self) -> str:
        return f"{self.method} {self.variant}".strip()


def lines_of(rows: Iterable[Row], claim: str) -> list[Line]:
    """The lines of one claim, best first; cells whose first seed has no result yet are left out."""
    cells: dict[str, list[Row]] = {}
    for row in rows:
        if claim in row["claim"].split("+"):
            cells.setdefault(row["cell"], []).append(row)
    lines = []
    for members in cells.values():
        counts = {seed: sum(row["seed"] == seed for row in members) for seed in {row["seed"] for row in members}}
        first = max(counts, key=lambda seed: (counts[seed], -seed))  # the one that got the whole grid
        grid = {row["lr"]: row["val_loss"] for row in members if row["seed"] == first}
        lr = best_lr(grid)
        chosen = {row["seed"]: row for row in members if row["lr"] == lr}
        config = flat(json.loads(members[0]["config"]))
        lines.append(Line(members[0]["cell"], members[0]["method"], config, lr, grid, chosen))
    _name_variants(lines)
    return sorted(lines, key=lambda line: (line.mean, line.name))


def flat(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings as one mapping with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}".removeprefix("settings.")] = value
    return found


def _name_variants(lines: list[Line]) -> None:
    """What tells the cells of one method apart, in words."""
    by_method: dict[str, list[Line]] = {}
    for line in lines:
        by_method.setdefault(line.method, []).append(line)
    for group in by_method.values():
        keys = sorted(set().union(*(line.config for line in group)) - {"lr", "seed"})
        varying = [key for key in keys if len({json.dumps(line.config.get(key)) for line in group}) > 1]
        for line in group:
            line.series = {key: line.config.get(key) for key in varying}
            line.variant = " ".join(f"{key}={_short(value)}" for key, value in line.series.items())


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(_short, value))
    return f"{value:g}" if type(value) is float else str(value)


def pooled_noise(lines: Iterable[Line]) -> float:
    """Standard deviation over seeds, pooled over the lines that have several."""
    squares = [(line.noise**2, len(line.rows) - 1) for line in lines if not math.isnan(line.noise)]
    weight = sum(count for _, count in squares)
    return math.sqrt(sum(square * count for square, count in squares) / weight) if weight else math.nan


def perplexity_differences(line: Line, reference: Line) -> list[float]:
    """How much higher the perplexity is than the reference's, in percent, for each common seed; both are finite."""
    seeds = sorted(set(line.losses) & set(reference.losses))
    return [100 * math.expm1(line.losses[seed] - reference.losses[seed]) for seed in seeds]


def at_most(limit: float, values: list[float]) -> str:
    """Whether the mean over seeds is at most `limit`: "undecided" where that is within two of its standard errors."""
    if len(values) < 2:
        return "one seed"
    mean, doubt = fmean(values), 2 * stdev(values) / math.sqrt(len(values))
    return "yes" if mean + doubt <= limit else "no" if mean - doubt > limit else "undecided"


def difference(line: Line, reference: Line) -> tuple[float, float]:
    """Mean and standard error of the loss differences over common seeds: they share tokens and initial weights."""
    seeds = sorted(set(line.losses) & set(reference.losses))
    values = [line.losses[seed] - reference.losses[seed] for seed in seeds]
    if not values or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
