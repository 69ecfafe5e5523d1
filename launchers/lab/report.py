"""Tables and plots of a results file. All numbers come from its rows; the grid file gives titles and what to draw."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lab.plots import draw_claim
from lab.questions import TASKS
from lab.results import Row
from lab.summary import Line, at_most, difference, lines_of, perplexity_differences, pooled_noise

MARK = "<!-- report: what stands below is written by experiment.py -->"
_HEAD = ["method", "lr", "seeds", "validation loss", "perplexity", "MB sent", "of DDP's", "state, KB (+ host)"]
_DIAGNOSTICS = {
    "overlap": "overlap of bases",
    "captured_energy": "gradient energy captured",
    "change_effective_rank": "effective rank of W - W0",
    "outside": "energy of W - W0 outside its top r",
    "attention_stable_rank": "attention: stable rank of W",
    "attention_spectral_gap": "attention: s1/s2 of W",
    "attention_change_gap_at_rank": "attention: s_r/s_r+1 of W - W0",
}
SAME_PERCENT = 0.5  # perplexities so near each other count as the same
_LEGEND = """\
Perplexity is the exponential of the mean loss per token. ± is the standard deviation over seeds. "lr" is the rate
of the grid with the lowest loss on the first seed; "<" and ">" mark one at the grid's lower or upper end (a better
one may lie beyond), "!" one that was not searched. "MB sent" is what the rank that sends most sends in the whole run;
the low-rank baselines that average at every step are charged the coordinates of their gradients only, and nothing for
their bases. "State" is the optimizer's on the accelerator, of the rank that keeps most; what lives in host memory
beside a GPU (the anchor, the outer momentum, what a wire has not said yet) is counted apart. Differences are paired
over seeds, ± their standard error."""


def write_report(
    rows: list[Row], answered: list[dict[str, Any]], document: dict[str, Any], prefix: Path, commands: list[str]
) -> Path:
    """`prefix`.md, and `prefix`_<claim>.png for every claim with results; text above the mark is kept."""
    page = prefix.with_name(prefix.name + ".md")
    page.parent.mkdir(parents=True, exist_ok=True)
    above = page.read_text(encoding="utf-8").split(MARK)[0] if page.exists() else f"# {prefix.name}\n\n"
    parts = [above.rstrip() + "\n", MARK, _facts(rows, commands), _LEGEND]
    for name, claim in document["claims"].items():
        lines = lines_of(rows, name)
        if lines:
            picture = prefix.with_name(f"{prefix.name}_{name}.png")
            draw_claim(lines, claim.get("report", {}), claim.get("title", name), picture)
            parts.append(_section(name, claim, lines, picture.name))
            if any(row["cell"] == line.cell for row in answered for line in lines):
                parts.append(_tasks(lines, answered))
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _facts(rows: list[Row], commands: list[str]) -> str:
    """Where the numbers come from."""

    def several(key: str) -> str:
        return "; ".join(f"{value} ({count} runs)" for value, count in Counter(row[key] for row in rows).most_common())

    hours = sum(row["wall_s"] for row in rows) / 3600
    losses = {(row["model"], round(row["unigram_loss"], 3), round(row["bigram_loss"], 3)) for row in rows}
    plateaus = "; ".join(f"{model}: {unigram} and {bigram}" for model, unigram, bigram in sorted(losses))
    diverged = sum(row["diverged"] == 1 for row in rows)
    return "\n".join(
        [
            *(f"- command: `{command}`" for command in commands),
            f"- commit (+: with changes): {several('commit')}; digest of the code behind them: {several('code')}",
            f"- machine: {several('machine')}; {hours:.2f} core-hours",
            f"- {len(rows)} runs, {diverged} of them diverged (no better than a unigram model)",
            f"- loss of a unigram and of a bigram model on the same tokens: {plateaus}",
        ]
    )


def _section(name: str, claim: dict[str, Any], lines: list[Line], picture: str) -> str:
    report = claim.get("report", {})
    parts = [f"## {claim.get('title', name)}"]
    if claim.get("about"):
        parts.append(" ".join(str(claim["about"]).split()))
    parts += [f"![{claim.get('title', name)}]({picture})", _table(lines, report.get("reference"))]
    if report.get("diagnostics"):
        parts.append(_diagnostics(lines))
    reference = next((line for line in lines if line.method == report.get("reference")), None)
    if report.get("by_seed") and reference:
        parts.append(by_seed(lines, reference))
    noise = pooled_noise(lines)
    if not math.isnan(noise):
        parts.append(f"Noise: the standard deviation over seeds, pooled over the lines, is {noise:.4f}.")
    return "\n\n".join(parts)


def _table(lines: list[Line], reference_name: str | None) -> str:
    reference = next((line for line in lines if line.method == reference_name), None)
    ddp = max(line.value("bytes_ddp") for line in lines)
    head = [*_HEAD, *([f"against {reference_name}"] if reference else [])]
    body = []
    for line in lines:
        cells = [line.name, f"{line.lr:g}{line.edge}", str(len(line.rows)), _loss(line), f"{_exp(line.mean):.2f}"]
        cells += _costs(line, ddp)
        if reference:
            mean, error = difference(line, reference)
            both = f"{mean:+.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")
            cells.append("" if line is reference or math.isnan(mean) else both)
        body.append(cells)
    return markdown(head, body)


def _loss(line: Line) -> str:
    if not math.isfinite(line.mean):
        return "diverged"
    return f"{line.mean:.4f}" + ("" if math.isnan(line.noise) else f" ± {line.noise:.4f}")


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 50 else math.inf


def _costs(line: Line, ddp: float) -> list[str]:
    """Bytes sent, their share of what all-reducing the gradients at every (small) step sends, and the state."""
    sent = line.value("bytes")
    state, host = line.value("state_bytes"), line.value("host_state_bytes")
    saved = f"1/{ddp / sent:.1f}" if sent else "0"
    held = f"{(state - host) / 1e3:,.0f}" + (f" + {host / 1e3:,.0f}" if host else "")
    return [f"{sent / 1e6:,.1f}", saved, held]


def by_seed(lines: list[Line], reference: Line) -> str:
    """What a step sends, the loss of every seed, and how the perplexity compares; what sends most comes first."""
    seeds = sorted({seed for line in lines for seed in line.rows})
    head = ["method", "lr", "bytes a step", "of AdamW-DDP's", *(f"loss, seed {seed}" for seed in seeds)]
    head += [f"perplexity against {reference.name}", f"at most {SAME_PERCENT}% above"]
    body = []
    for line in sorted(lines, key=lambda line: -line.value("bytes")):
        sent, ddp = line.value("bytes"), line.value("bytes_ddp")
        cells = [line.name, f"{line.lr:g}{line.edge}", f"{sent / line.value('steps'):,.0f}", f"1/{ddp / sent:.1f}"]
        cells += [f"{line.losses[seed]:.4f}" if seed in line.losses else "" for seed in seeds]
        compared = ["", ""]
        if not math.isfinite(line.mean):
            compared = ["diverged", "no"]
        elif line is not reference and math.isfinite(reference.mean):
            above = perplexity_differences(line, reference)
            spread = f" ± {stdev(above):.2f}" if len(above) > 1 else ""
            compared = [f"{fmean(above):+.2f}%{spread}" if above else "", at_most(SAME_PERCENT, above)]
        body.append([*cells, *compared])
    return (
        'Perplexities are compared seed by seed: the mean, ± the standard deviation over seeds. "Undecided": the limit '
        "is within two standard errors of the mean.\n\n" + markdown(head, body)
    )


def _tasks(lines: list[Line], answered: list[dict[str, Any]]) -> str:
    """Accuracies of the lines that answered, means over seeds."""
    by_cell: dict[str, list[dict[str, Any]]] = {}
    for row in answered:
        by_cell.setdefault(row["cell"], []).append(row)
    body = []
    for line in lines:
        rows = by_cell.get(line.cell, [])
        means = [f"{fmean(row[task] for row in rows):.3f}" for task in TASKS] if rows else []
        body += [[line.name, str(len(rows)), *means]] if rows else []
    first = answered[0]
    body.append(["*guessing*", "", *(f"{first[task + '_chance']:.3f}" for task in TASKS)])
    error = 0.5 / first["items"] ** 0.5
    return (
        f"Held-out tasks, {first['items']:.0f} items each, accuracy (standard error of one run at most {error:.3f}); "
        "what they ask: `launchers/lab/questions.py`.\n\n" + markdown(["method", "seeds", *TASKS], body)
    )


def _diagnostics(lines: list[Line]) -> str:
    def text(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.4f}" if value < 10 else f"{value:,.1f}"

    body = [[line.name, *(text(line.value(key)) for key in _DIAGNOSTICS)] for line in lines]
    return markdown(["method", *_DIAGNOSTICS.values()], body)


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *body])
