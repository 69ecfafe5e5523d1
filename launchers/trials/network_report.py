"""What `bench_network.py` writes of its points: a page with tables, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from trials.network_model import model_section
from trials.network_points import Point, middle
from trials.network_settings import Setting

MARK = "<!-- report: what stands below is written by bench_network.py -->"
_LEGEND = """\
Each host is a network namespace of one machine, and its link a token bucket that limits what it sends and what it
receives to the rate at the head of the column, each. One rank a host, started by the `deepspeed` launcher in each; the
same model, data, batch and seed for all. A job keeps its processes for all rates; the first steps, the first sync
included, are not measured, and settings take turns. Numbers are medians over repetitions. Bytes are those of one host
and step: "interface" is the kernel's counter of sent bytes with all headers, less what the job sends in a pause;
"ledger" is what the run says that it sent (for methods that average gradients at every step: what a ring sends;
nobody counts it)."""


def write_report(points: list[Point], settings: Mapping[str, Setting], facts: dict[str, str], prefix: Path) -> Path:
    """`prefix`.md and `prefix`.png; text above the mark is kept."""
    page = prefix.with_name(prefix.name + ".md")
    picture = prefix.with_name(prefix.name + ".png")
    above = page.read_text(encoding="utf-8").split(MARK)[0] if page.exists() else "# Training over slow links\n\n"
    parts = [above.rstrip() + "\n", MARK, _circumstances(points, facts), _LEGEND]
    good = [point for point in points if point.ok]
    if good:
        draw(good, picture)
        parts.append(f"![Tokens per second by rate of the link]({picture.name})")
    for hosts in sorted({point.hosts for point in points}):
        parts += _sections([point for point in points if point.hosts == hosts])
    parts += [model_section(points, settings), _not_measured(points)]
    parts.append(f"Every point: [{prefix.name}.csv]({prefix.name}.csv).")
    page.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    return page


def in_words(mbit_per_s: float | None) -> str:
    return "no limit" if mbit_per_s is None else f"{mbit_per_s:g} Mbit/s"


def by_speed(rates: set[float | None]) -> list[float | None]:
    """The slowest first, no limit last."""
    limited = sorted(rate for rate in rates if rate is not None)
    return [*limited, *([None] if None in rates else [])]


def _circumstances(points: list[Point], facts: dict[str, str]) -> str:
    lines = [
        f"`{facts['command']}`, {facts['date']}; commit {facts['commit']}; {facts['machine']}; {facts['versions']}."
    ]
    busy = [point.others_threads for point in points if point.others_threads is not None]
    if busy:
        lines.append(
            f"Other programs had {min(busy):.1f} to {max(busy):.1f} threads that ran or waited for a core, "
            f"{median(busy):.1f} in the median job (each measured while it paused)."
        )
    queued = [point.queued_s / point.step_s for point in points if point.queued_s is not None and point.step_s]
    if queued:
        lines.append(
            f"Ranks were ready to run and waited for a core for {median(queued):.0%} of their time in the median "
            f"point, {max(queued):.0%} at most; where there are more hosts than cores, they wait for each other too."
        )
    return "\n".join(lines)


def _sections(points: list[Point]) -> list[str]:
    hosts = points[0].hosts
    parts = [f"## {hosts} hosts", "Tokens per second (in brackets: of the same setting without a limit)"]
    parts.append(_by_rate(points, _speed))
    if any(point.blocked_s is not None for point in points):
        parts += ["Seconds of a step blocked in communication", _by_rate(points, _blocked)]
    return [*parts, "Bytes per step", _bytes(points)]


def _by_rate(points: list[Point], cell: Callable[[list[Point], list[Point]], str]) -> str:
    rates = by_speed({point.mbit_per_s for point in points})
    lines = [f"| | {' | '.join(map(in_words, rates))} |", "|---|" + "---:|" * len(rates)]
    for setting in _settings(points):
        own = [point for point in points if point.setting == setting]
        cells = [cell([point for point in own if point.mbit_per_s == rate], own) for rate in rates]
        lines.append(f"| {' | '.join([setting, *cells])} |")
    return "\n".join(lines)


def _settings(points: list[Point]) -> list[str]:
    return list(dict.fromkeys(point.setting for point in points))


def _speed(points: list[Point], own: list[Point]) -> str:
    speed = middle(points, "tokens_per_s")
    if speed is None:
        return points[0].status.partition(":")[0] if points else ""
    free = middle([point for point in own if point.mbit_per_s is None], "tokens_per_s")
    return f"{speed:,.0f}" + (f" ({speed / free:.0%})" if free and points[0].mbit_per_s is not None else "")


def _blocked(points: list[Point], own: list[Point]) -> str:
    blocked = middle(points, "blocked_s")
    return "" if blocked is None else f"{blocked:.3f}"


def _bytes(points: list[Point]) -> str:
    lines = ["| | interface, sent | received | ledger | ledger / interface | idle, bytes/s |", "|---|" + "---:|" * 5]
    for setting in _settings(points):
        # With a limit packets have the wire's size; without one the kernel counts one header for many.
        own = [point for point in points if point.setting == setting and point.ok]
        limited = [point for point in own if point.mbit_per_s is not None] or own
        cells = [_number(middle(limited, key)) for key in ("tx_bytes", "rx_bytes", "ledger_bytes")]
        share = middle(limited, "ledger_share")
        cells += ["" if share is None else f"{share:.3f}", _number(middle(own, "idle_bytes_per_s"))]
        if own:
            lines.append(f"| {' | '.join([setting, *cells])} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _not_measured(points: list[Point]) -> str:
    reasons = dict.fromkeys((point.setting, point.status) for point in points if not point.ok)
    if not reasons:
        return ""
    return "\n".join(["## Not measured", "", *(f"- {setting}: {status}" for setting, status in reasons)])


def draw(points: list[Point], path: Path) -> None:
    """Tokens per second against the link's rate, one panel for each number of hosts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({point.hosts for point in points})
    figure, axes = pyplot.subplots(
        1, len(counts), figsize=(6.2 * len(counts), 4.6), layout="constrained", squeeze=False, sharey=True
    )
    colours = {name: pyplot.get_cmap("tab20")(number % 20) for number, name in enumerate(_settings(points))}
    for axis, hosts in zip(axes.flat, counts, strict=True):
        _panel(axis, [point for point in points if point.hosts == hosts], colours)
        axis.set(title=f"{hosts} hosts", xlabel="link, Mbit/s each way", yscale="log")
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylabel("tokens per second (log)")
    axes.flat[-1].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _panel(axis: Any, points: list[Point], colours: dict[str, Any]) -> None:
    rates = by_speed({point.mbit_per_s for point in points})
    for setting in _settings(points):
        found = [
            (place, middle([p for p in points if p.setting == setting and p.mbit_per_s == rate], "tokens_per_s"))
            for place, rate in enumerate(rates)
        ]
        shown = [(place, speed) for place, speed in found if speed is not None]
        axis.plot(*zip(*shown, strict=True), "o-", markersize=4, linewidth=1.2, label=setting, color=colours[setting])
    axis.set_xticks(range(len(rates)), ["no limit" if rate is None else f"{rate:g}" for rate in rates])
