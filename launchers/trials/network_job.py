"""One job of `bench_network.py`: a launcher in every host, its ranks led through the segments of a plan."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from trials.hosts import INTERFACE, Hosts
from trials.machine import ROOT, running_threads
from trials.network_points import Rows
from trials.network_settings import Setting
from trials.pacer import PACE, Plan

_PORT = 29_500  # every job has its hosts for itself
_QUIET_S, _FIRST_QUIET_S, _SETTLE_S, _LAST_WORDS_S, _POLL_S = 0.2, 3.0, 0.3, 1.0, 0.02
_TOO_LONG = "failed: it took longer than --job-timeout"


@dataclass
class Outcome:
    """What a job left."""

    rows: list[Rows] = field(default_factory=list)
    """By rank, one rank a host; as far as it came."""
    error: str = ""
    """Why it ended early: "refused: ..." where the settings are to blame."""
    others_threads: float = float("nan")
    """Threads of other programs that ran or waited for a core while this job's ranks paused after the warm-up."""


def run_job(
    hosts: Hosts, setting: Setting, plan: Plan, model: Path, folder: Path, seed: int, timeout_s: float
) -> Outcome:
    """Start it, change the link's rate before every segment, and end it; nothing of it runs afterwards."""
    folder.mkdir(parents=True)
    plan.write(folder)
    hosts.set_rate(None)
    script = _script(setting, plan, model, folder, seed)
    (folder / "hosts").write_text("".join(f"host{number} slots=1\n" for number in range(hosts.count)))
    outcome = Outcome()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes += [_launch(hosts, number, script, folder) for number in range(hosts.count)]
        outcome.error = _lead(hosts, plan, folder, processes, outcome, time.monotonic() + timeout_s)
    finally:
        hosts.end_processes()
        for process in processes:
            process.wait()
    outcome.rows = [_rows(folder / f"rank{number}.jsonl") for number in range(hosts.count)]
    return outcome


def _script(setting: Setting, plan: Plan, model: Path, folder: Path, seed: int) -> list[str]:
    common = ["--model", str(model), "--train-steps", str(plan.steps), "--seed", str(seed)]
    if setting.torchft is not None:
        options = [f"--{key.replace('_', '-')}={json.dumps(value)}" for key, value in setting.torchft.items()]
        return [str(ROOT / "launchers" / "trials" / "torchft_gpt.py"), *common, *options]
    (folder / "ds.json").write_text(json.dumps(setting.deepspeed, indent=2) + "\n")
    own = ["--deepspeed_config", str(folder / "ds.json"), "--output-dir", str(folder / "run"), "--eval-interval", "0"]
    return [str(ROOT / "launchers" / "trials" / "paced_gpt.py"), *common, *own]


def _launch(hosts: Hosts, number: int, script: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """DeepSpeed's launcher in one host, as on one node of a cluster without ssh; its output goes to a file."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(folder / "hosts"), "--no_ssh"]
    launcher += ["--node_rank", str(number), "--master_addr", hosts.addresses[0], "--master_port", str(_PORT)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "launchers")]),
        "PYTHONWARNINGS": "ignore",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // hosts.count)),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
        PACE: str(folder),
    }
    command = hosts.command(number, *launcher, "--log_level", "warning", *script)
    with (folder / f"host{number}.log").open("wb") as stream:
        return subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _lead(
    hosts: Hosts,
    plan: Plan,
    folder: Path,
    processes: list[subprocess.Popen[bytes]],
    outcome: Outcome,
    until: float,
) -> str:
    """Through all segments to the end; the reason if it does not come to it."""
    for number in range(len(plan.segments) + 1):
        while not all((folder / f"rank{rank}.at{number}").exists() for rank in range(hosts.count)):
            # None may end before its last pause: DeepSpeed's launcher exits with 0 when the one below it was killed.
            if any(process.poll() is not None for process in processes):
                time.sleep(_LAST_WORDS_S)
                return reason(folder)
            if time.monotonic() > until:
                return _TOO_LONG
            time.sleep(_POLL_S)
        last = number == len(plan.segments)
        time.sleep(_SETTLE_S)  # what the last step sent is acknowledged
        (folder / f"quiet{number}").touch()
        if number == 0:
            outcome.others_threads = running_threads(_FIRST_QUIET_S)
        else:
            time.sleep(_QUIET_S)
        hosts.set_rate(None if last else plan.segments[number].mbit_per_s)
        (folder / f"go{number}").touch()
    while any(process.poll() is None for process in processes):
        if time.monotonic() > until:
            return _TOO_LONG
        time.sleep(_POLL_S)
    return "" if all(process.returncode == 0 for process in processes) else reason(folder)


def reason(folder: Path) -> str:
    """Why a job ended, from the last words of its hosts."""
    said = {path.stem: path.read_text(errors="replace") for path in sorted(folder.glob("host*.log"))}
    for text in said.values():
        found = re.search(r"^\w+\.py: error(?: on rank \d+)?: (.*)$", text, re.MULTILINE)
        if found:
            return f"refused: {found[1]}"
    for text in said.values():
        errors = re.findall(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception)\b.*)$", text, re.MULTILINE)
        if errors:
            return f"failed: {errors[-1]} (see {folder})"
    return f"failed: see the logs in {folder}"


def _rows(path: Path) -> Rows:
    """What a rank noted; the last line may be cut."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
