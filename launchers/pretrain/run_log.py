"""What a run of `pretrain_gpt.py` leaves behind: metrics.jsonl, TensorBoard, loss.png, summary.json."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections import Counter, deque
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from pretrain.launch import say
from pretrain.metrics_file import Row, line_of, read_rows


class Hook(Protocol):
    """What the script reads of `lordo_ds.hook(engine)`."""

    @property
    def replicas(self) -> int: ...

    @property
    def data_parallel_size(self) -> int: ...

    @property
    def data_parallel_rank(self) -> int: ...

    @property
    def synced(self) -> bool: ...

    @property
    def next_sync_in(self) -> int: ...

    @property
    def bytes_sent(self) -> int: ...

    @property
    def seconds_blocked(self) -> float | None: ...

    @property
    def blocked_per_step_s(self) -> float | None: ...

    def record(self, **values: float) -> None: ...

    def averaged_rows(self) -> list[dict[str, float]]: ...

    def finish(self) -> None: ...


class EveryStepHook:
    """The same where all ranks are one replica, with LoRDO or without: gradients are averaged at every step.

    Losses and norms are averaged over the ranks every `ROWS_PER_REDUCTION` steps, in one small reduction. How long the
    engine's gradients take is not known.
    """

    ROWS_PER_REDUCTION = 32
    replicas = 1
    synced = True
    next_sync_in = 1
    bytes_sent = 0
    seconds_blocked = None
    blocked_per_step_s = None

    def __init__(self, group: Any, lordo_hook: Any = None) -> None:
        self.data_parallel_rank: int = group.rank()
        self.data_parallel_size: int = group.size()
        self._group = group
        self._lordo_hook = lordo_hook
        self._held: list[dict[str, float]] = []
        self._ready: list[dict[str, float]] = []

    def record(self, **values: float) -> None:
        self._held.append(values)
        if len(self._held) == self.ROWS_PER_REDUCTION:
            self.flush()

    def averaged_rows(self) -> list[dict[str, float]]:
        ready, self._ready = self._ready, []
        return ready

    def finish(self) -> None:
        if self._lordo_hook is not None:
            self._lordo_hook.finish()
        self.flush()

    def flush(self) -> None:
        """Average what is held now. Collective."""
        import torch
        import torch.distributed as dist
        from deepspeed.accelerator import get_accelerator

        if not self._held:
            return
        keys = list(self._held[0])
        device = get_accelerator().current_device_name()
        values = [[row[key] for key in keys] for row in self._held]
        rows = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(rows, group=self._group)
        rows /= self.data_parallel_size
        self._ready += [dict(zip(keys, row, strict=True)) for row in rows.tolist()]
        self._held = []


class RunLog:
    """Rows wait here for the averages that ride with a sync, then go to disk in order; rank 0 writes."""

    def __init__(self, folder: Path, writes: bool, monitor: Any, resumed_step: int, waiting: list[Row]) -> None:
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.rows: list[Row] = []
        self._waiting: deque[Row] = deque(waiting)
        self._written: Counter[str] = Counter()
        self._writes = writes
        self._monitor = monitor
        if writes:
            self._take_up(waiting[0]["step"] - 1 if waiting else resumed_step, resumed_step == 0)

    def _take_up(self, complete: int, anew: bool) -> None:
        """Go on after the rows up to a step, cut where a crash has damaged them; a new run leaves an older one's."""
        from lordo_ds.disk import write_text

        if anew and self.path.exists() and self.path.stat().st_size:
            aside = _free_name(self.folder / "metrics_of_earlier_run.jsonl")
            self.path.rename(aside)
            say(f"{self.path} was an earlier run's: it is now {aside.name}")
        rows, damage = read_rows(self.path, complete)
        if damage:
            kept = f"those up to step {rows[-1]['step']} are kept" if rows else "none is kept"
            say(f"{self.path}: {damage}: of the {complete} rows before the checkpoint {kept}, the run goes on")
        self._keep(rows)
        write_text(self.path, "".join(map(line_of, self.rows)))

    def put_on_disk(self) -> None:
        """Before a checkpoint that goes on after the rows written so far."""
        from lordo_ds.disk import flush_file

        if self._writes:
            flush_file(self.path)

    @property
    def waiting(self) -> list[Row]:
        """Rows whose averages have not come yet."""
        return list(self._waiting)

    @property
    def last(self) -> Row:
        """The row of the newest step; what is put into it before its averages come goes to disk with them."""
        return self._waiting[-1]

    def total(self, key: str) -> float:
        """Sum of a column over the whole run, the rows that wait included (rank 0)."""
        return self._written[key] + sum(row[key] for row in self._waiting)

    def add(self, row: Row) -> None:
        self._waiting.append(row)

    def flush(self, averaged: list[dict[str, float]]) -> None:
        """Write the oldest waiting rows, their local values replaced by these averages."""
        rows = [{**self._waiting.popleft(), **means} for means in averaged]
        if not rows or not self._writes:
            return
        self._keep(rows)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.writelines(map(line_of, rows))
        self._monitor.write_events([event for row in rows for event in _events(row)])

    def _keep(self, rows: list[Row]) -> None:
        self.rows += rows
        for row in rows:
            self._written.update({key: row[key] for key in ("bytes_replica", "bytes_ddp")})

    def finish(self, facts: Row) -> None:
        """Write summary.json and loss.png."""
        if self._writes:
            assert not self._waiting, "rows are left without averages"
            from lordo_ds.disk import write_text

            facts = {**facts, "versions": _versions()}
            write_text(self.folder / "summary.json", json.dumps(facts, indent=2) + "\n")
            _plot(self.rows, facts, self.folder / "loss.png")


def _free_name(path: Path) -> Path:
    """The path, or with the first number that makes it new."""
    names = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("lordo_ds", "torch", "deepspeed", "megatron-core", "sentencepiece"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _events(row: Row) -> list[tuple[str, float, int]]:
    """TensorBoard scalars of a row, over samples as DeepSpeed's own are."""
    names = {
        "loss": "Train/loss",
        "grad_norm": "Train/grad_norm",
        "tokens_per_s": "Speed/tokens_per_s",
        "bytes_replica": "Communication/bytes_replica",
        "bytes_ddp": "Communication/bytes_ddp",
        "seconds_blocked": "Communication/seconds_blocked",
        "val_loss": "Validation/loss",
    }
    return [(name, row[key], row["samples"]) for key, name in names.items() if row.get(key) is not None]


def _plot(rows: list[Row], facts: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for key, style, label in (("loss", "-", "training loss"), ("val_loss", "o-", "validation loss")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axes.plot(*zip(*points, strict=True), style, linewidth=1, markersize=4, label=label)
    axes.axhline(math.log(facts["unigram_perplexity"]), color="gray", linestyle=":", label="unigram model")
    axes.set(xlabel="step", ylabel="nats per token", title=facts["title"])
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def times_less(sent: float, ddp: float) -> str:
    """How sent bytes compare with DDP's, in words."""
    if not ddp:
        return "one rank: nothing to send"
    if sent >= ddp:
        return "as much" if sent == ddp else f"{sent / ddp:.3g}x more"
    return f"{ddp / sent:.3g}x less" if sent else "nothing sent"
