"""Trains LoRDO and what it competes with over slow links between hosts, side by side, and measures what it costs.

    sudo python launchers/bench_network.py --output docs/results/network
    sudo python launchers/bench_network.py --quick --output /tmp/network     # three settings, under four minutes

The hosts are network namespaces of this machine, so it needs Linux, root, `ip` and `tc`; whatever it makes it deletes,
also when it is interrupted. What is compared stands in configs/network.yaml, on CPUs. OUTPUT.csv grows with every job.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pretrain.launch import ArgumentParser, one_line_errors
from trials.bench import provenance
from trials.hosts import Hosts, why_not
from trials.jobs import fresh_folder
from trials.machine import ROOT, running_threads
from trials.network_job import run_job
from trials.network_points import Point, points_of, refused_points, write_points
from trials.network_report import in_words, write_report
from trials.network_settings import Setting, choose, read_settings

QUIET_THREADS, QUIET_WINDOW_S = 0.3, 5.0
RATES = ["5", "10", "20", "100", "1000", "unlimited"]
QUICK: dict[str, Any] = {
    "hosts": [2],
    "rates": ["20", "unlimited"],
    "repetitions": 1,
    "settings": ["AdamW, ZeRO 1", "DiLoCo", "LoRDO"],
}


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--table", type=Path, default=ROOT / "configs" / "network.yaml", metavar="YAML", help="default: %(default)s")
    add("--settings", nargs="+", metavar="NAME", help="lines of the table; default: all")
    add("--hosts", nargs="+", type=int, metavar="N", help="default: 2 4")
    add("--rates", nargs="+", metavar="MBIT_PER_S", help=f"of each link, each way; default: {' '.join(RATES)}")
    add("--repetitions", type=int, metavar="N", help="default: 2")
    add("--periods", type=int, default=1, metavar="N", help="sync intervals at each rate; default: %(default)s")
    add("--least-steps", type=int, default=32, metavar="N", help="at each rate; default: %(default)s")
    add("--model", type=Path, default=ROOT / "configs" / "model" / "tiny.yaml", metavar="YAML")
    add("--seed", type=int, default=1234)
    add("--quick", action="store_true", help="other defaults: three settings, 2 hosts, two rates, once")
    add("--wait-for-quiet", type=float, default=0.0, metavar="SECONDS", help="that a job may wait for other programs")
    add("--job-timeout", type=float, default=1800.0, metavar="SECONDS", help="default: %(default)g")
    add("--work-dir", type=Path, default=ROOT / "runs" / "bench_network", help="emptied; default: %(default)s")
    add("--output", type=Path, required=True, metavar="PREFIX", help="of the .csv, .md and .png")
    args = parser.parse_args()
    defaults = QUICK if args.quick else {"hosts": [2, 4], "rates": RATES, "repetitions": 2}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, least in (("repetitions", 1), ("periods", 1), ("least_steps", 1), ("job_timeout", 1.0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name):g}: must be at least {least:g}")
    args.rates = [parse_rate(text) for text in args.rates]
    return args


def parse_rate(text: str) -> float | None:
    """Mbit/s, or None for "unlimited"."""
    if text == "unlimited":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e6:
        raise ValueError(f"--rates {text}: must be a number of Mbit/s above 0 and below 1e6, or `unlimited`")
    return rate


def measure(args: argparse.Namespace, settings: list[Setting], facts: dict[str, str]) -> list[Point]:
    """All jobs, each repetition of all settings before the next; the CSV and the page grow with each job."""
    points: list[Point] = []
    for repetition in range(1, args.repetitions + 1):
        # Every other time backwards: what drifts with time must not meet one rate, or one setting, always alike.
        order = -1 if repetition % 2 == 0 else 1
        for hosts_count in args.hosts:
            for setting in settings[::order]:
                points += measure_one(args, setting, hosts_count, repetition, args.rates[::order])
                write_points(args.output.with_name(args.output.name + ".csv"), points, facts)
                write_report(points, {one.name: one for one in settings}, facts, args.output)
    return points


def measure_one(
    args: argparse.Namespace, setting: Setting, hosts_count: int, repetition: int, rates: list[float | None]
) -> list[Point]:
    """One job, in hosts of its own."""
    head = f"{setting.name}, {hosts_count} hosts, repetition {repetition}"
    if setting.refusal:
        print(f"{head}: refused: {setting.refusal}", flush=True)
        return refused_points(setting.name, hosts_count, rates, repetition, f"refused: {setting.refusal}")
    plan = setting.plan(rates, args.periods, args.least_steps)
    folder = args.work_dir / "".join(c if c.isalnum() else "_" for c in f"{setting.name}_{hosts_count}_{repetition}")
    wait_for_quiet(args.wait_for_quiet)
    began = time.monotonic()
    with Hosts(hosts_count) as hosts:
        outcome = run_job(hosts, setting, plan, args.model, folder, args.seed, args.job_timeout)
    points = points_of(setting.name, plan, outcome.rows, outcome.error, repetition, outcome.others_threads)
    said = ", ".join(
        f"{in_words(point.mbit_per_s)} {point.tokens_per_s:,.0f}" for point in points if point.tokens_per_s is not None
    )
    print(f"{head}, {time.monotonic() - began:.0f} s: tokens/s at {said}" if said else f"{head}:", flush=True)
    if outcome.error:
        print(f"  {outcome.error}", flush=True)
    return points


def wait_for_quiet(patience_s: float) -> None:
    """Until other programs leave the cores free, or for so long."""
    until = time.monotonic() + patience_s
    while (left_s := until - time.monotonic()) > 0 and running_threads(min(QUIET_WINDOW_S, left_s)) > QUIET_THREADS:
        continue


def facts_of() -> dict[str, str]:
    """Where the numbers come from, for every row of the file."""
    found = provenance()
    return {
        "date": found["date"],
        "commit": found["commit"][:10] + (" with changes" if found["uncommitted_changes"] else ""),
        "machine": f"{found['cpu']}, {found['cores']} cores, {found['system']}",
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        "command": found["command"],
    }


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with one_line_errors("bench_network.py"):
        args = parse_arguments()
        settings = choose(read_settings(args.table), args.settings)
        reason = why_not()
        if reason:
            raise ValueError(reason)
        args.output.parent.mkdir(parents=True, exist_ok=True)
    fresh_folder(args.work_dir)
    points = measure(args, settings, facts_of())
    print(f"{args.output}.md, {args.output}.csv")
    return int(any(point.status.startswith("failed") for point in points))


if __name__ == "__main__":
    sys.exit(main())
