"""Kill or freeze a random rank of a small run at a random moment, again and again, going on from the last save.

    python launchers/kill_test.py --kills 50 --output docs/results/kill_test

After the last kill the run is let to its end, and compared, row by row and bit by bit, with one that nobody
disturbed. The table of outcomes goes to OUTPUT.md and OUTPUT.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from trials.jobs import ROOT, Job, circumstances, fresh_folder, metrics, write_settings

SAVE_INTERVAL, SYNC_TIMEOUT_S = 10, 5.0
HUNG_AFTER_S = 120.0
COMPARED = ("step", "loss", "lr", "grad_norm")


@dataclass
class Outcome:
    """One kill: when and whom, how the job ended, and where the next one went on."""

    number: int
    launcher: str
    moment: str
    signal: str
    rank: int
    seconds_to_end: float
    exit_code: int | None
    step_reached: int
    last_save: int
    save_cut_short: bool
    resumed_from: int = -1
    said: str = ""

    @property
    def steps_lost(self) -> int:
        return max(0, self.step_reached - max(0, self.resumed_from))

    @property
    def ok(self) -> bool:
        """It ended by itself, with an error; the next went on from the last save, losing no more than an interval."""
        ended = self.exit_code not in (None, 0)
        return ended and self.resumed_from == self.last_save and self.steps_lost <= SAVE_INTERVAL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "kill_test")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "kill_test")
    args = parser.parse_args()
    options = write_settings(fresh_folder(args.work_dir), {"sync_timeout_s": SYNC_TIMEOUT_S})
    script = [str(ROOT / "launchers" / "pretrain_gpt.py"), *options, "--eval-interval", "0"]
    draw = random.Random(args.seed)
    run = args.work_dir / "run"
    outcomes: list[Outcome] = []
    for number in range(1, args.kills + 1):
        outcomes.append(disturb(number, script, run, draw, outcomes))
        print(_line(outcomes[-1]), flush=True)
    differences = finish_and_compare(script, args.work_dir, outcomes)
    write_table(args.output, outcomes, differences)
    bad = [outcome.number for outcome in outcomes if not outcome.ok]
    not_good = f"; not: {bad}" if bad else ""
    print(f"{len(outcomes) - len(bad)} of {len(outcomes)} as they should be{not_good}; {differences}")
    return int(bool(bad) or "differs" in differences)


def disturb(number: int, script: list[str], run: Path, draw: random.Random, before: list[Outcome]) -> Outcome:
    """Start the job, or go on with it, and hit one rank."""
    launcher = draw.choice(["torchrun", "deepspeed"])
    moment = draw.choices(["training", "save", "start-up"], [6, 3, 1])[0]
    # A frozen rank is found by its heartbeat, which begins when the optimizer is attached.
    how = signal.SIGSTOP if moment != "start-up" and draw.random() < 0.25 else signal.SIGKILL
    rank, delay_s = draw.randrange(2), draw.random()
    more = ["--output-dir", str(run), "--save-interval", str(SAVE_INTERVAL), "--resume", "auto"]
    job = Job.start(launcher, [*script, *more, "--train-steps", "19999"], run.parent / f"job{number}.log")
    pid = _wait_for_moment(job, moment, rank, delay_s, run)
    if pid is None:
        job.end(0.0)
        raise SystemExit(f"job {number} did not start:\n{job.text()[-3000:]}")
    _note_resumption(job, before)
    os.kill(pid, how)
    began = time.monotonic()
    exit_code = job.end(HUNG_AFTER_S)
    seconds = time.monotonic() - began
    _note_resumption(job, before)
    said = [line for line in job.text().splitlines() if line.startswith("LoRDO: ") and "Last completed sync" in line]
    told = [int(step) for line in said for step in re.findall(r"rank \d+ is at step (\d+)", line)]
    rows = [row["step"] for row in metrics(run)]
    return Outcome(
        number,
        launcher,
        moment,
        how.name,
        rank,
        seconds,
        exit_code,
        max([0, *told, *rows]),
        _last_save(run),
        _save_cut_short(run),
        said=said[0] if said else "",
    )


def _wait_for_moment(job: Job, moment: str, rank: int, delay_s: float, run: Path) -> int | None:
    """The process to hit, now."""
    if moment == "start-up":
        until = time.monotonic() + 60
        while rank not in job.rank_pids() and time.monotonic() < until and job.process.poll() is None:
            time.sleep(0.05)
        time.sleep(8 * delay_s)
        return job.rank_pids().get(rank)
    if not job.wait_for("tokens/s |"):
        return None
    pid = job.rank_pids().get(rank)  # before the wait: it takes longer than a save
    if moment == "training":
        time.sleep(2 * delay_s)
    else:
        _wait_for_save(run, delay_s)
    return pid


def _wait_for_save(run: Path, delay_s: float) -> None:
    """Return within a save: when the folder of a checkpoint has just come up, or a little later."""
    folder = run / "checkpoints"
    known = set(os.listdir(folder)) if folder.exists() else set()
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if folder.exists() and set(os.listdir(folder)) - known:
            time.sleep(0.04 * delay_s)
            return
        time.sleep(0.001)


def _note_resumption(job: Job, before: list[Outcome]) -> None:
    """Where this job went on after the last kill, from what it says."""
    if not before or before[-1].resumed_from >= 0:
        return
    found = re.search(r"resumed from step (\d+)", job.text())
    if found:
        for outcome in reversed(before):
            if outcome.resumed_from >= 0:
                break
            outcome.resumed_from = int(found[1])
    elif "step 1/" in job.text():
        before[-1].resumed_from = 0


def _last_save(run: Path) -> int:
    latest = run / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("global_step")) if latest.exists() else 0


def _save_cut_short(run: Path) -> bool:
    """Whether there is a checkpoint newer than the one that `latest` names."""
    steps = [re.search(r"global_step(\d+)", path.name) for path in (run / "checkpoints").glob("*global_step*")]
    return any(int(found[1]) > _last_save(run) for found in steps if found)


def finish_and_compare(script: list[str], folder: Path, outcomes: list[Outcome]) -> str:
    """Let the run end, train another without a disturbance, and say whether their rows are equal."""
    steps = str(max(outcome.step_reached for outcome in outcomes) + 2 * SAVE_INTERVAL)
    for name, more in (("run", ["--resume", "auto"]), ("undisturbed", [])):
        output = ["--output-dir", str(folder / name), "--save-interval", "0", "--train-steps", steps]
        job = Job.start("torchrun", [*script, *output, *more], folder / f"{name}.log")
        exit_code = job.end(1200.0)
        _note_resumption(job, outcomes)
        if exit_code != 0:
            return f"the last job differs: it ended with {exit_code}"
    rows, expected = (
        [{key: row[key] for key in COMPARED} for row in metrics(folder / name)] for name in ("run", "undisturbed")
    )
    if rows == expected:
        return f"all {len(rows)} rows equal those of an undisturbed run, bit by bit"
    first = next((i for i, pair in enumerate(zip(rows, expected, strict=False)) if pair[0] != pair[1]), "length")
    return f"the run differs from an undisturbed one, first in row {first}"


def _line(outcome: Outcome) -> str:
    code = "did not end" if outcome.exit_code is None else f"exit code {outcome.exit_code}"
    return (
        f"{outcome.number}: {outcome.signal} rank {outcome.rank} in {outcome.moment} under {outcome.launcher}: {code} "
        f"after {outcome.seconds_to_end:.1f} s, at step {outcome.step_reached}, last save {outcome.last_save}. "
        f"{outcome.said}"
    )


def write_table(output: Path, outcomes: list[Outcome], differences: str) -> None:
    with output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*asdict(outcomes[0]), "steps_lost", "ok"], lineterminator="\n")
        writer.writeheader()
        for outcome in outcomes:
            row = {**asdict(outcome), "seconds_to_end": f"{outcome.seconds_to_end:.1f}"}
            writer.writerow({**row, "steps_lost": outcome.steps_lost, "ok": outcome.ok})
    lines = [
        "# Ranks killed and frozen at random moments",
        "",
        f"A tiny GPT on 2 replicas, saved every {SAVE_INTERVAL} steps, `sync_timeout_s` {SYNC_TIMEOUT_S:g}. A random",
        "rank of each job is killed (`SIGKILL`) or frozen (`SIGSTOP`); the next job goes on with `--resume auto`. All",
        "is as it should be if the job ended by itself with an error, and the next went on from the last complete",
        f"save, having lost {SAVE_INTERVAL} steps at most. A rank that dies is also named by the launcher; the last",
        "column counts the jobs whose other rank had the time to name it, and the last sync, before the launcher",
        "ended that one too.",
        "",
        circumstances(),
        "",
        f"**{sum(o.ok for o in outcomes)} of {len(outcomes)} as they should be; {differences}.**",
        "",
        "| moment | signal | launcher | kills | saves cut short | as they should be | seconds to the end: median | "
        "largest | steps lost: largest | rank and last sync named |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted({(o.moment, o.signal, o.launcher) for o in outcomes}):
        same = [o for o in outcomes if (o.moment, o.signal, o.launcher) == key]
        seconds = sorted(o.seconds_to_end for o in same)
        cut_short, good, said = (sum(map(bool, column)) for column in zip(*_flags(same), strict=True))
        lines.append(
            f"| {' | '.join(key)} | {len(same)} | {cut_short} | {good} | {seconds[len(seconds) // 2]:.1f} | "
            f"{seconds[-1]:.1f} | {max(o.steps_lost for o in same)} | {said} |"
        )
    lines += ["", f"Every kill: [{output.name}.csv]({output.name}.csv).", ""]
    output.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


def _flags(outcomes: list[Outcome]) -> list[tuple[bool, bool, bool]]:
    return [(o.save_cut_short, o.ok, bool(o.said)) for o in outcomes]


if __name__ == "__main__":
    sys.exit(main())
