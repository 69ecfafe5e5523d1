"""Plots of a claim: panels that its `report` names, each from the rows alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lab.summary import Line

_LABELS = {
    "bytes": "MB sent by one rank (log)",
    "state_bytes": "optimizer state incl. host, KB (log)",
    "device_state": "optimizer state on the accelerator, KB (log)",
    "sync_interval": "K, steps between syncs",
    "rank": "rank r",
    "replicas": "replicas M (same global batch)",
    "omega": "omega",
    "betas": "beta1",
    "sync_warmup_steps": "first steps synced every step",
}
# table and column of a row's curve, and the axis
_CURVES = {
    "overlap": ("syncs", 1, "overlap of consecutive bases"),
    "captured": ("syncs", 2, "gradient energy captured"),
    "effective_rank": ("validation", 2, "effective rank of W - W0"),
    "validation": ("validation", 1, "validation loss on the way"),
}
_LOSS = "validation loss (nats per token)"


def draw_claim(lines: list[Line], report: dict[str, Any], title: str, path: Path) -> None:
    """One figure, one panel for each of `report["panels"]`; a line has one colour in all of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = report.get("panels") or [{"kind": "lr"}]
    columns = 2 if len(panels) in (2, 4) else len(panels)
    size = (5.6 * columns, 4.4 * (len(panels) // columns))
    figure, axes = pyplot.subplots(len(panels) // columns, columns, figsize=size, layout="constrained", squeeze=False)
    finite = [line for line in lines if math.isfinite(line.mean)]
    colours = {line.name: pyplot.get_cmap("tab20")(number % 20) for number, line in enumerate(finite)}
    for axis, panel in zip(axes.flat, panels, strict=True):
        _PANELS[panel["kind"]](axis, finite, panel, colours)
        axis.grid(alpha=0.3)
    seeds = "-".join(map(str, sorted({len(line.rows) for line in finite})))
    figure.suptitle(f"{title}\nbars: standard deviation over seeds ({seeds} a point)", fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def ceiling(losses: list[float]) -> float:
    """The top of a loss axis: what is far worse than most must not flatten all else."""
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    if not finite:
        return 1.0
    spread = median(finite) - finite[0]
    shown = [loss for loss in finite if loss <= finite[0] + 4 * spread + 0.05]
    return shown[-1] + 0.12 * (shown[-1] - finite[0]) + 0.01


def _limit(axis: Any, losses: list[float], names: list[str]) -> None:
    """Cut the axis at the ceiling, and say what lies above."""
    top = ceiling(losses)
    above = [f"{name}: {loss:.2f}" for name, loss in zip(names, losses, strict=True) if loss > top]
    low = min((loss for loss in losses if math.isfinite(loss)), default=0.0)
    axis.set_ylim(low - 0.06 * (top - low) - 0.005, top)
    if above:
        text = "above: " + ", ".join(above)
        axis.text(0.02, 0.98, text, transform=axis.transAxes, fontsize=6, va="top", wrap=True)


def _noise(line: Line) -> float:
    return 0.0 if math.isnan(line.noise) else line.noise


def _cost(line: Line, key: str) -> float:
    if key == "device_state":
        return (line.value("state_bytes") - line.value("host_state_bytes")) / 1e3
    return line.value(key) / (1e6 if key == "bytes" else 1e3)


def _frontier(axis: Any, lines: list[Line], panel: dict[str, Any], colours: dict[str, Any]) -> None:
    """Loss against what a run costs; every line a labelled point."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    top = ceiling([line.mean for line in lines])
    for line in lines:
        x = _cost(line, panel["x"])
        axis.errorbar(x, line.mean, yerr=_noise(line), fmt="o", capsize=3, color=colours[line.name])
        if line.mean <= top:
            axis.annotate(line.name, (x, line.mean), (4, 3), textcoords="offset points", fontsize=6)
    axis.set(xscale="log", xlabel=_LABELS.get(panel["x"], panel["x"]), ylabel=_LOSS)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(lambda value, position: "")
    axis.margins(x=0.2)
    _limit(axis, [line.mean for line in lines], [line.name for line in lines])


def _lines(axis: Any, lines: list[Line], panel: dict[str, Any], colours: dict[str, Any]) -> None:
    """Loss against one setting, a curve for every combination of the others."""
    key = panel["x"]
    curves: dict[str, list[Line]] = {}
    for line in lines:
        others = {k: v for k, v in line.series.items() if k != key and k not in panel.get("with", ())}
        name = " ".join([line.method, *(f"{k}={_plain(v)}" for k, v in others.items())])
        curves.setdefault(name, []).append(line)
    for name, members in sorted(curves.items()):
        members.sort(key=lambda line: _plain(line.config[key]))
        x = [_plain(line.config[key]) for line in members]
        axis.errorbar(x, [m.mean for m in members], yerr=[_noise(m) for m in members], fmt="o-", capsize=3, label=name)
    if panel.get("log", False):
        axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({_plain(line.config[key]) for line in lines}))
    axis.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.set(xlabel=_LABELS.get(key, key), ylabel=_LOSS)
    axis.legend(fontsize=6)
    _limit(axis, [line.mean for line in lines], [line.name for line in lines])


def _plain(value: Any) -> Any:
    """The first of a pair (beta1 of the betas), anything else as it is."""
    return value[0] if isinstance(value, list) else value


def _lr(axis: Any, lines: list[Line], panel: dict[str, Any], colours: dict[str, Any]) -> None:
    """How sensitive each line is to the learning rate, first seed."""
    for line in lines:
        points = sorted((lr, loss) for lr, loss in line.grid.items() if math.isfinite(loss))
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, "o-", markersize=3, linewidth=1, label=line.name, color=colours[line.name])
    rates = sorted({lr for line in lines for lr in line.grid})
    axis.set(xscale="log", xlabel="learning rate (log), first seed", ylabel=_LOSS)
    axis.set_xticks(rates, [f"{lr:g}" for lr in rates])
    axis.xaxis.set_minor_formatter(lambda value, position: "")
    best = [min(line.grid.values()) for line in lines]
    low = min(best, default=0.0)
    axis.set_ylim(low - 0.02, ceiling(best) + 0.5 * (ceiling(best) - low))
    axis.legend(fontsize=6)


def _curve(axis: Any, lines: list[Line], panel: dict[str, Any], colours: dict[str, Any]) -> None:
    """Something that happened on the way, mean over seeds."""
    table, column, label = _CURVES[panel["y"]]
    for line in lines:
        by_step: dict[float, list[float]] = {}
        for row in line.rows.values():
            for entry in json.loads(row["curve"])[table]:
                if not math.isnan(entry[column]):
                    by_step.setdefault(entry[0], []).append(entry[column])
        points = [(step, fmean(values)) for step, values in sorted(by_step.items())]
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, "o-", markersize=3, linewidth=1, label=line.name, color=colours[line.name])
    axis.set(xlabel="step", ylabel=label)
    axis.legend(fontsize=6)


_PANELS: dict[str, Callable[[Any, list[Line], dict[str, Any], dict[str, Any]], None]] = {
    "frontier": _frontier,
    "lines": _lines,
    "lr": _lr,
    "curve": _curve,
}
