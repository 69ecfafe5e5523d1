"""Draw the losses of several runs and tabulate what they reached and sent, from their own files.

    python launchers/compare_runs.py runs/lordo runs/adamw_ddp --output docs/tiny

writes tiny_loss.png, tiny_runs.csv and tiny_runs.md there (the table; text above it is kept).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
from pathlib import Path
from typing import Any

TABLE_MARK = "<!-- table -->"


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the rows of one run.

    Raises:
        SystemExit: the folder is not that of a finished run.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder}: not a finished run of pretrain_gpt.py ({error})") from None
    return summary, rows


def smooth(values: list[float], width: int) -> list[float]:
    """Means over the last `width` values."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_step, by_bytes) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for name, rows in runs.items():
        losses, sent, total = smooth([row["loss"] for row in rows], 10), [], 0
        for row in rows:
            total += row["bytes_replica"]
            sent.append(max(total, 1) / 1e6)
        by_step.plot([row["step"] for row in rows], losses, label=name, linewidth=1.2)
        by_bytes.plot(sent, losses, label=name, linewidth=1.2)
    by_step.set(xlabel="step", ylabel="training loss (mean of 10 steps)")
    by_bytes.set(xlabel="MB sent by each rank", xscale="log")
    by_bytes.set_xlim(left=1.0)
    by_step.legend(fontsize=8)
    for axes in (by_step, by_bytes):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="prefix of the files to write")
    args = parser.parse_args()
    found = {folder.name: read_run(folder) for folder in args.runs}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw({name: rows for name, (_, rows) in found.items()}, Path(f"{args.output}_loss.png"))
    columns = ["run", "steps", "tokens", "val_loss", "val_perplexity", "unigram_perplexity", "bytes_sent", "bytes_ddp"]
    lines = [
        [name, s["steps"], s["tokens"], s["val_loss"], s["val_perplexity"], s["unigram_perplexity"], s["bytes_replica"],
         s["bytes_ddp"]]
        for name, (s, _) in found.items()
    ]  # fmt: skip
    with Path(f"{args.output}_runs.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *lines])
    table = ["| run | validation loss | perplexity | MB sent per rank | of DDP's |", "|---|---|---|---|---|"]
    for name, _, _, loss, perplexity, _, sent, ddp in lines:
        table.append(f"| {name} | {loss:.4f} | {perplexity:.1f} | {sent / 1e6:,.1f} | 1/{ddp / max(1, sent):.1f} |")
    summary = next(iter(found.values()))[0]
    versions = ", ".join(f"{package} {version}" for package, version in summary["versions"].items())
    facts = (
        f"\n{summary['steps']} steps, {summary['tokens']:,} tokens, "
        f"{summary['data_parallel_size']} data-parallel ranks; "
        f"unigram perplexity {summary['unigram_perplexity']:.1f}; {platform.machine()}, {os.cpu_count()} cores; "
        f"{versions}."
    )
    page = Path(f"{args.output}_runs.md")
    above = page.read_text().split(TABLE_MARK)[0] if page.exists() else f"# {args.output.name}\n\n"
    page.write_text("\n".join([above + TABLE_MARK, "", *table, facts, ""]))
    print("\n".join(table))


if __name__ == "__main__":
    main()
