"""A contender of `bench_step.py`: what its rounds showed, and the numbers and the table that come of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lordo_ds.core.state import PLACED
from trials.bench import spread

BASELINES = ("torch AdamW (fused)", "DeepSpeed AdamW")
SYNC_INTERVAL = 32  # of configs/ds/lordo.json: a sync's time is spread over so many steps
# What a projected step consists of: functions that lordo_ds.replica.inner_step calls.
PARTS = {
    "project": ("_project",),
    "moments": ("_advance",),
    "lift": ("_apply",),
    "border rows": ("sum_borders",),
    "columns": ("scatter_columns", "gather_columns"),
}


@dataclass
class Contender:
    """One optimizer with a model of its own, and what its rounds showed, in seconds."""

    engine: Any
    state_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: int | None = None
    losses: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    parts: list[Counter[str]] = field(default_factory=list)
    """By the rounds with clocks; "optimizer" is the base optimizer's whole step()."""
    synced: list[bool] = field(default_factory=list)
    """Of all rounds, those with clocks last."""


def take_the_busiest(one: Contender) -> None:
    """Put the numbers of the process that had most to do in place of this one's: ZeRO may cut unevenly. Collective."""
    import torch.distributed as dist

    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (one.steps, one.parts, one.state_bytes, one.peak_bytes))
    steps, parts, sizes, peaks = zip(*ranks, strict=True)
    one.steps = [max(step) for step in zip(*steps, strict=True)]
    one.parts = max(parts, key=lambda rounds: sum(spent["optimizer"] for spent in rounds))
    one.state_bytes = max(sizes, key=lambda kinds: sum(kinds.values()))
    one.peak_bytes = None if None in peaks else max(peaks)


def summary(one: Contender, contenders: dict[str, Contender]) -> dict[str, Any]:
    """What the result file says of one contender."""
    count = len(one.steps)
    plain = [i for i in range(count) if not one.synced[i]]
    plain_clocked = [i for i in range(count) if not one.synced[count + i]]
    optimizer = [parts["optimizer"] for parts in one.parts]
    found: dict[str, Any] = {
        "train_step_s": spread([one.steps[i] for i in plain]),
        "train_step_wall_s": spread([one.wall[i] for i in plain]),
        "optimizer_step_s": spread([optimizer[i] for i in plain_clocked]),
        "state_bytes": {**one.state_bytes, "total": sum(one.state_bytes.values())},
        "peak_memory_bytes": one.peak_bytes,
        "losses": [one.losses[0], one.losses[-1]],
    }
    for name in BASELINES:
        base = contenders[name]
        found.setdefault("train_ratio", {})[name] = spread([one.steps[i] / base.steps[i] for i in plain])
        found.setdefault("optimizer_ratio", {})[name] = spread(
            [optimizer[i] / base.parts[i]["optimizer"] for i in plain_clocked]
        )
    if any(one.synced):
        kinds = (*PARTS, "dense AdamW")
        split = {kind: median(one.parts[i][kind] for i in plain_clocked) for kind in kinds}
        found["optimizer_split_s"] = {**split, "other": found["optimizer_step_s"]["median"] - sum(split.values())}
        at_sync = [parts for parts in one.parts if parts["sync"]]
        found["sync_s"] = {kind: median(parts[kind] for parts in at_sync) for kind in ("sync", "refresh")}
        extra = found["sync_s"]["sync"] / SYNC_INTERVAL / found["train_step_s"]["median"]
        ratios = found["train_ratio"].items()
        found["train_ratio_with_syncs"] = {name: ratio["median"] * (1 + extra) for name, ratio in ratios}
    return found


def table(part: dict[str, Any]) -> str:
    """One part as Markdown; a ratio above 1 is slower."""
    lines = [
        f"### {part['processes']} process(es), ZeRO {part['stage']}\n",
        "| | training step, ms | to fused AdamW | to DeepSpeed's | with syncs, to fused | wall, ms | "
        "optimizer step, ms | to fused | to DeepSpeed's | state + anchor, MiB | peak, MiB |",
        "|---|" + "---:|" * 10,
    ]
    for name, one in part["contenders"].items():
        step, wall, optimizer = (one[key] for key in ("train_step_s", "train_step_wall_s", "optimizer_step_s"))
        cells = [f"{1e3 * step['median']:.0f} ({1e3 * step['low_quartile']:.0f}-{1e3 * step['high_quartile']:.0f})"]
        cells += [f"{one['train_ratio'][base]['median']:.3f}" for base in BASELINES]
        cells += [f"{one['train_ratio_with_syncs'][BASELINES[0]]:.3f}" if "sync_s" in one else ""]
        cells += [f"{1e3 * wall['median']:.0f}", f"{1e3 * optimizer['median']:.1f}"]
        cells += [f"{one['optimizer_ratio'][base]['median']:.2f}" for base in BASELINES]
        sizes = one["state_bytes"]
        anchored = sum(sizes.get(kind, 0) for kind in PLACED)
        cells += [f"{(sizes['total'] - anchored) / 2**20:.1f}" + (f" + {anchored / 2**20:.1f}" if anchored else "")]
        cells += ["" if one["peak_memory_bytes"] is None else f"{one['peak_memory_bytes'] / 2**20:.0f}"]
        lines.append(f"| {' | '.join([name, *cells])} |")
    for name, one in part["contenders"].items():
        if "sync_s" in one:
            split, sync = one["optimizer_split_s"].items(), one["sync_s"]
            line = ", ".join(f"{kind} {1e3 * s:.1f}" for kind, s in split if s)
            line += f"; a sync {1e3 * sync['sync']:.0f}, the refresh of all bases in it {1e3 * sync['refresh']:.0f}"
            lines.append(f"\n{name}, ms: {line}")
    return "\n".join(lines) + "\n"
