"""Runs a grid of experiments from one file, and makes tables and plots of their results.

    python launchers/experiment.py configs/experiments/claims.yaml --budget 20m

All replicas of a run live in one process; runs are packed onto the cores (or one GPU). What is finished is a row of
results.csv and is not run again, so a command may be stopped and given again, with a larger budget or more claims.

    ... --report --docs docs/results/claims      tables and plots from results.csv alone
    ... --rerun 4a755d0e1d               one row again, compared with the first time
    ... --tasks quality                  the chosen runs of a claim again, with held-out tasks at their end
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Before torch is imported, here and in the processes of the runs: one core each.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
# The server that the processes are forked from loads the modules below launchers once, and finds them only so.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), str(ROOT / "launchers"), os.environ.get("PYTHONPATH")])
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("grid", type=Path, metavar="YAML")
    add("--tier", default="small", help="of the grid file; default: %(default)s")
    add("--budget", type=duration, metavar="20m", help="start no run that would not end within it: 90s, 20m, 3h")
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at once; default: the cores")
    add("--output", type=Path, metavar="DIR", help="default: runs/experiments/<grid>-<tier>")
    add("--only", nargs="+", metavar="CLAIM", help="these claims of the file; default: all")
    add("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    add("--list", action="store_true", help="print the runs that are left, in order, and stop")
    add("--report", action="store_true", help="run nothing: tables and plots from results.csv")
    add("--docs", type=Path, metavar="PREFIX", help="write the report to PREFIX.md and copy the CSV to PREFIX.csv")
    add("--tasks", metavar="CLAIM", help="run a claim's chosen runs again and answer held-out tasks: tasks.csv")
    add("--rerun", metavar="ROW_ID", help="run one row again and compare")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    args.output = args.output or ROOT / "runs" / "experiments" / f"{args.grid.stem}-{args.tier}"
    args.command = "python launchers/experiment.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
    return args


def duration(text: str) -> float:
    """Seconds of "90s", "20m" or "3h"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: write it like 90s, 20m or 3h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def say(line: str) -> None:
    print(line, flush=True)


def run_grid(args: argparse.Namespace) -> int:
    """Run what is left; 1 where runs failed."""
    from lab.grid import load_grid
    from lab.pool import Pool, describe, estimate
    from lab.results import read_rows
    from lordo_ds.data.cache import locked

    everything = load_grid(args.grid, args.tier)
    grid = load_grid(args.grid, args.tier, args.only)
    path = args.output / "results.csv"
    if args.list:
        pending = grid.pending(read_rows(path))
        for spec in pending:
            say(f"{describe(spec)}: {grid.claims_of(spec.cell)}")
        hours = sum(map(estimate, pending)) / 3600
        say(f"{len(pending)} runs now, {grid.runs_in_all()} in all; about {hours:.1f} core-hours, later seeds apart")
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "command.txt").open("a") as stream:
        stream.write(args.command + "\n")
    prepare_data(grid)
    with locked(args.output / "results.lock", say):
        # A row names all claims of the file that it serves, also those that are not run now.
        pool = Pool(grid, path, args.jobs, args.device, args.budget, everything.claims_of)
        pool.run(say)
    rows = read_rows(path)
    left = len(grid.pending(rows))
    say(f"{pool.finished} runs in {pool.elapsed / 60:.1f} min; {left} left{' at least' * bool(left)}; {path}")
    for failed, why in pool.failed.items():
        say(f"failed: {failed}: {why}")
    if rows:
        report(args)
    return 1 if pool.failed else 0


def prepare_data(grid: object) -> None:
    """Tokenize once, before several processes want the same."""
    from lab.data import open_text
    from lab.grid import Grid
    from lab.model import SIZES

    assert isinstance(grid, Grid)
    for vocab in {SIZES[spec.model].vocab for cell in grid.cells for spec in cell.specs.values()}:
        open_text(vocab)


def rows_of_today(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The results, with the claims that the grid file gives their cells now; a cell that has left it keeps its own."""
    from lab.grid import load_grid
    from lab.results import read_rows

    path = args.output / "results.csv"
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: no results yet")
    grid = load_grid(args.grid, args.tier)
    return [{**row, "claim": grid.claims_of(row["cell"]) or row["claim"]} for row in rows]


def report(args: argparse.Namespace) -> int:
    """Tables and plots from the CSV alone."""
    import shutil

    from lab.grid import load_document
    from lab.report import write_report
    from lab.results import write_rows
    from lab.tasks import read_tasks

    rows = rows_of_today(args)
    history = args.output / "command.txt"
    commands = list(dict.fromkeys(history.read_text().splitlines())) if history.exists() else []
    prefix = args.docs or args.output / "report"
    answered = args.output / "tasks.csv"
    page = write_report(rows, read_tasks(answered), load_document(args.grid, args.tier), prefix, commands)
    if args.docs:
        write_rows(prefix.with_name(prefix.name + ".csv"), rows)
        if answered.exists():
            shutil.copyfile(answered, prefix.with_name(prefix.name + "_tasks.csv"))
    say(f"{len(rows)} runs -> {page}")
    return 0


def tasks(args: argparse.Namespace) -> int:
    """Held-out tasks for the runs at the chosen learning rates; 1 where one did not repeat itself."""
    from lab.summary import lines_of
    from lab.tasks import run_tasks

    chosen = [row for line in lines_of(rows_of_today(args), args.tasks) for row in line.rows.values()]
    if not chosen:
        raise ValueError(f"{args.output / 'results.csv'}: no results of a claim {args.tasks!r}")
    odd = run_tasks(chosen, args.output / "tasks.csv", args.jobs, args.device, say)
    report(args)
    return 1 if odd else 0


def rerun(args: argparse.Namespace) -> int:
    """One row again; 0 where every repeated number is equal."""
    from lab.results import REPEATED, code_digest, read_rows
    from lab.run import execute
    from lab.spec import RunSpec

    path = args.output / "results.csv"
    row = next((row for row in read_rows(path) if row["id"] == args.rerun), None)
    if row is None:
        raise ValueError(f"{path}: no row {args.rerun!r}")
    if code_digest() != row["code"]:
        say(f"the code is not that of the row ({row['code']}, commit {row['commit']}): numbers may differ")
    spec = RunSpec.from_json(row["config"])
    again = execute(spec, args.device)
    odd = [key for key in REPEATED if again[key] != row[key] and not _both_nan(again[key], row[key])]
    say(f"{spec.id} ({spec.method}): validation loss {row['val_loss']!r} then, {again['val_loss']!r} now")
    for key in odd:
        say(f"{key} differs" + (f": {row[key]} then, {again[key]} now" if key != "curve" else ""))
    return 1 if odd else 0


def _both_nan(a: object, b: object) -> bool:
    return isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)


def choose_device(name: str | None) -> str:
    """Also tells DeepSpeed, which looks for an accelerator when lordo_ds is imported."""
    if name != "cpu":
        import torch

        if torch.cuda.is_available():
            return name or "cuda"
        if name is not None:
            raise ValueError(f"--device {name}: torch sees no CUDA device")
    os.environ["DS_ACCELERATOR"] = "cpu"
    return "cpu"


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the runs under way too
    try:
        args.device = choose_device(args.device)
        if args.tasks:
            return tasks(args)
        return rerun(args) if args.rerun else report(args) if args.report else run_grid(args)
    except ValueError as error:
        print(f"experiment.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
