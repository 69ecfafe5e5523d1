"""Runs on the cores or the GPU there is: one process each, N at once, within a budget of time."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lab.grid import Grid
from lab.model import SIZES, parameter_count
from lab.results import Row, append_row, provenance, read_rows
from lab.spec import RunSpec

_START_S = 2.0
_FLOPS = 4.0e10  # of one core on matrices this small; corrected by what this machine is seen to do
_CONTEXT = "forkserver"


def estimate(spec: RunSpec) -> float:
    """Seconds of one run on one core, before anything was measured."""
    size = SIZES[spec.model]
    tokens = spec.sequences * size.seq_length
    optimizers = 1 if spec.one_replica else spec.replicas
    per_step = 6 * parameter_count(size) * tokens / _FLOPS + 0.0015 * optimizers * size.layers
    evaluated = spec.validation * size.seq_length * 2 * parameter_count(size) / _FLOPS
    return _START_S + spec.steps * per_step + 2 * evaluated


@dataclass
class _Job:
    spec: RunSpec
    process: Any
    pipe: Connection
    began: float
    expected_s: float


class Pool:
    """Starts what the grid wants next until nothing is left or the budget would not hold it."""

    def __init__(
        self,
        grid: Grid,
        csv_path: Path,
        jobs: int,
        device: str,
        budget_s: float | None,
        claims_of: Callable[[str], str],
    ) -> None:
        self.grid, self.csv_path, self.jobs, self.device = grid, csv_path, jobs, device
        self.claims_of = claims_of
        self.began, self.budget_s = time.monotonic(), budget_s
        self.facts = provenance(device)
        self.context = multiprocessing.get_context(_CONTEXT)
        self.context.set_forkserver_preload(["torch._dynamo", "lab.run"])  # an optimizer needs the first
        self.running: list[_Job] = []
        self.failed: dict[str, str] = {}
        self.finished = 0
        self.ratios: list[float] = []
        self.shown = 0.0

    def run(self, say: Callable[[str], None]) -> None:
        """Returns when all that fits has been run; what a run raised is kept in `failed`."""
        rows = read_rows(self.csv_path)
        try:
            while True:
                if not self._start_what_fits(rows) and not self.running:
                    break
                for job in self._wait():
                    row = self._take(job, say)
                    if row is not None:
                        append_row(self.csv_path, row)
                        rows = read_rows(self.csv_path)
                self._show(rows, say)
        finally:
            for job in self.running:
                job.process.kill()

    # -- starting ------------------------------------------------------------------------------------

    def _start_what_fits(self, rows: list[Row]) -> bool:
        started = False
        busy = {job.spec.id for job in self.running} | set(self.failed)
        for spec in self.grid.pending(rows):
            if len(self.running) >= self.jobs:
                break
            if spec.id in busy:
                continue
            expected = estimate(spec) * self.slowness
            if self.budget_s is not None and self.elapsed + expected > self.budget_s:
                continue
            receiver, sender = self.context.Pipe(duplex=False)
            process = self.context.Process(target=_child, args=(spec.to_json(), self.device, sender))
            process.start()
            sender.close()
            self.running.append(_Job(spec, process, receiver, time.monotonic(), expected))
            started = True
        return started

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def slowness(self) -> float:
        """How much longer than estimated the last runs took."""
        last = self.ratios[-20:]
        return sum(last) / len(last) if last else 1.0

    # -- finishing -----------------------------------------------------------------------------------

    def _wait(self) -> list[_Job]:
        ready = wait([job.pipe for job in self.running], timeout=1.0)
        done = [job for job in self.running if job.pipe in ready]
        self.running = [job for job in self.running if job not in done]
        return done

    def _take(self, job: _Job, say: Callable[[str], None]) -> Row | None:
        try:
            kind, value = job.pipe.recv()
        except EOFError:
            kind, value = "error", "the process ended without a result"
        job.process.join()
        if kind == "error":
            self.failed[job.spec.id] = value
            say(f"FAILED {describe(job.spec)}: {value}")
            return None
        self.finished += 1
        self.ratios.append((time.monotonic() - job.began) / estimate(job.spec))
        return full_row(job.spec, value, self.claims_of(job.spec.cell), self.facts)

    # -- showing -------------------------------------------------------------------------------------

    def _show(self, rows: list[Row], say: Callable[[str], None]) -> None:
        """One line that stays in place on a terminal; one a minute in a log."""
        terminal = sys.stderr.isatty()
        if time.monotonic() - self.shown < (1.0 if terminal else 60.0):
            return
        self.shown = time.monotonic()
        cells = {cell.key for cell in self.grid.cells}
        ids = {row["id"] for row in rows if row["cell"] in cells}
        known = [spec for spec in self.grid.pending(rows) if spec.id not in self.failed]
        in_all = max(self.grid.runs_in_all(), len(ids) + len(known))
        unknown = in_all - len(ids) - len(known)  # later seeds, whose rate is not known yet
        costs = [estimate(spec) * self.slowness for spec in known]
        left_s = sum(costs) * (1 + unknown / max(1, len(known))) / self.jobs
        if self.budget_s is not None:
            left_s = min(left_s, max(0.0, self.budget_s - self.elapsed))
        done = len(ids)
        filled = round(20 * done / max(1, in_all))
        line = f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{in_all} runs, {self.elapsed / 60:.1f} min, "
        line += f"about {left_s / 60:.0f} min left"
        if terminal:
            print(f"\r{line}   ", end="", file=sys.stderr, flush=True)
        else:
            say(line)


def full_row(spec: RunSpec, measured: Row, claim: str, facts: Row) -> Row:
    """The CSV's line of a finished run."""
    config = spec.config
    return {
        "id": spec.id,
        "cell": spec.cell,
        "claim": claim,
        "method": spec.method,
        "model": spec.model,
        "seed": spec.seed,
        "lr": spec.lr,
        "steps": spec.steps,
        "omega": config.omega,
        "beta1": config.betas[0],
        "qh_mode": config.qh_mode,
        "projection": config.projection,
        "sync_warmup_steps": config.sync_warmup_steps,
        "config": spec.to_json(),
        **facts,
        **measured,
    }


def describe(spec: RunSpec) -> str:
    return f"{spec.id} ({spec.method}, lr {spec.lr:g}, seed {spec.seed})"


def _child(spec_json: str, device: str, pipe: Connection) -> None:
    """One run in a process of its own; its row, or what it raised, goes into the pipe."""
    import logging

    logging.getLogger("lordo_ds").setLevel(logging.ERROR)
    try:
        from lab.run import execute

        pipe.send(("row", execute(RunSpec.from_json(spec_json), device)))
    except BaseException as error:
        pipe.send(("error", f"{type(error).__name__}: {' '.join(str(error).split())}"))
        raise
