"""Train a small GPT for long under faults, and compare it with runs that nobody disturbed.

    python launchers/soak_test.py --steps 2000 --output docs/results/soak_test

NaNs, overflows, slow replicas and two crashes, which torchrun answers by restarting the job. Written to OUTPUT.md:
the losses beside those of undisturbed runs with other seeds, what was left out, and the memory over time.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trials.faulty_gpt import SLOW_S
from trials.jobs import RANKS, ROOT, Job, circumstances, fresh_folder, metrics, write_settings

CLEAN_SEEDS = (1, 2, 3)
SETTLED_STEP = 100  # memory is compared from here on, in each process
ALLOWED_GROWTH = 0.02
LAST_STEPS = 100


@dataclass
class Run:
    """What one run came to."""

    name: str
    val_loss: float
    last_loss: float
    seconds: float
    memory: dict[int, list[dict[str, Any]]]
    """By process: its notes, in order."""
    output: str

    @property
    def growth(self) -> float:
        """The largest growth of a process's memory since it had settled, relative."""
        found = [0.0]
        for notes in self.memory.values():
            settled = [note["rss_mib"] for note in notes if note["step"] >= notes[0]["step"] + SETTLED_STEP]
            found += [settled[-1] / settled[0] - 1.0] if settled else []
        return max(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--precision", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "soak_test")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "soak_test")
    args = parser.parse_args()
    keys = {"fp16": {"enabled": True, "initial_scale_power": 12}} if args.precision == "fp16" else {}
    options = write_settings(fresh_folder(args.work_dir), {"sync_timeout_s": 60.0}, **keys)
    faults = draw_faults(args.steps, random.Random(args.seed))
    none = {kind: [] for kind in faults}
    clean = [train(args, options, f"undisturbed, seed {seed}", seed, none) for seed in CLEAN_SEEDS]
    faulty = train(args, options, f"under faults, seed {CLEAN_SEEDS[0]}", CLEAN_SEEDS[0], faults)
    text, good = report(args, faults, clean, faulty)
    args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return int(not good)


def draw_faults(steps: int, draw: random.Random) -> dict[str, list[list[int]]]:
    """About one fault in 25 steps, none in the last tenth, and two crashes."""

    def places(count: int) -> list[list[int]]:
        return sorted([draw.randrange(5, steps * 9 // 10), draw.randrange(RANKS)] for _ in range(count))

    crashes = [[steps * k // 3 + draw.randrange(50), draw.randrange(RANKS)] for k in (1, 2)]
    return {
        "nan": places(steps // 100),
        "overflow": places(steps // 50),
        "slow": places(steps // 100),
        "crash": crashes,
    }


def train(args: argparse.Namespace, options: list[str], name: str, seed: int, faults: dict[str, Any]) -> Run:
    folder = args.work_dir / re.sub(r"\W+", "_", name)
    notes = fresh_folder(folder / "memory")
    script = [str(ROOT / "launchers" / "trials" / "faulty_gpt.py"), *options, "--output-dir", str(folder)]
    script += ["--eval-interval", "0"]
    script += ["--train-steps", str(args.steps), "--save-interval", "100", "--seed", str(seed), "--resume", "auto"]
    began = time.monotonic()
    environment = {"LORDO_FAULTS": json.dumps(faults), "LORDO_MEMORY": str(notes)}
    job = Job.start("torchrun --max-restarts=2", script, folder / "job.log", **environment)
    exit_code = job.end(900.0)
    if exit_code != 0:
        raise SystemExit(f"{name}: ended with {exit_code}\n{job.text()[-3000:]}")
    memory: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(notes.glob("rank*.jsonl")):
        for note in map(json.loads, path.read_text().splitlines()):
            memory.setdefault(note["pid"], []).append(note)
    rows = metrics(folder)
    last = [row["loss"] for row in rows[-LAST_STEPS:] if row["loss"] is not None]
    val_loss = json.loads((folder / "summary.json").read_text())["val_loss"]
    print(f"{name}: validation loss {val_loss:.4f} after {len(rows)} steps", flush=True)
    return Run(name, val_loss, statistics.fmean(last), time.monotonic() - began, memory, job.text())


def report(args: argparse.Namespace, faults: dict[str, Any], clean: list[Run], faulty: Run) -> tuple[str, bool]:
    """The page, and whether all is as it should be."""
    losses = [run.val_loss for run in clean]
    mean, noise = statistics.fmean(losses), max(losses) - min(losses)
    # Every rank says so, and a step that a crash undid comes twice.
    left_out = len(set(re.findall(r"at step (\d+): left out of this sync", faulty.output)))
    to_anchor = len(set(re.findall(r"at step (\d+).*back to the anchor", faulty.output)))
    outliers = sum(
        run.output.count("is far from the others") for run in [*clean, faulty]
    )  # none of these faults is one
    resumed = re.findall(r"resumed from step (\d+)", faulty.output)
    within = faulty.val_loss <= max(losses) + noise
    flat = all(run.growth <= ALLOWED_GROWTH for run in [*clean, faulty])
    counts = ", ".join(f"{len(where)} {kind}" for kind, where in faults.items())
    lines = [
        "# A long run under faults",
        "",
        f"{args.steps} steps of a tiny GPT on {RANKS} replicas in {args.precision}, a sync every 8 steps,",
        "a save every 100.",
        f"Faults: {counts} (a slow step takes {SLOW_S:g} s longer; a crash is a `kill -9`, answered by",
        "`torchrun --max-restarts`).",
        "",
        circumstances(),
        "",
        f"**Validation loss {faulty.val_loss:.4f} under faults; {mean:.4f} undisturbed, with a range of {noise:.4f}",
        f"between seeds: {'not above' if within else 'ABOVE'} the largest of them plus that range. "
        f"Memory {'flat' if flat else 'NOT flat'}.**",
        "",
        f"Syncs with a replica left out: {left_out}; back to the anchor, no replica being finite: {to_anchor};",
        f"replicas taken for outliers: {outliers}; resumed from steps {', '.join(resumed) or 'none'}.",
        "",
        f"| run | validation loss | training loss, last {LAST_STEPS} steps | seconds | memory growth | largest MiB |",
        "|---|---|---|---|---|---|",
    ]
    for run in [*clean, faulty]:
        largest = max(note["rss_mib"] for notes in run.memory.values() for note in notes)
        lines.append(
            f"| {run.name} | {run.val_loss:.4f} | {run.last_loss:.4f} | {run.seconds:.0f} | {run.growth:+.2%} "
            f"| {largest:.0f} |"
        )
    lines += ["", f"Memory growth: the largest of a process, from {SETTLED_STEP} steps after it began to its end.", ""]
    return "\n".join(lines), within and flat and not outliers and len(resumed) == 2


if __name__ == "__main__":
    sys.exit(main())
