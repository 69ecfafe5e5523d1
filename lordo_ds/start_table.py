"""The table that a run prints when it starts: the mesh, what is projected and why, the state by kind."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lordo_ds import costs
from lordo_ds.config import LordoConfig, OuterOptimizer
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.model_size import ModelSize

logger = logging.getLogger("lordo_ds")


@dataclass(frozen=True)
class RunShape:
    """The mesh of a run, and in words what drives it; `replica_size` counts the data-parallel ranks of a replica."""

    replicas: int
    replica_index: int
    replica_size: int
    tensor_size: int = 1
    pipe_size: int = 1
    zero_stage: int = 0
    driver: str = "without an engine"


def state_bytes(items: Sequence[Fragment]) -> dict[str, int]:
    """Bytes of optimizer state on this rank by kind, counted over the live tensors.

    Moments of parameters that are not projected are listed as `dense_exp_avg` and `dense_exp_avg_sq`.
    """
    kinds: Counter[str] = Counter()
    for item in items:
        for key, value in item.state.items():
            if isinstance(value, Tensor):
                kinds[costs.kind_of_state(key, item.plan.low_rank)] += value.numel() * value.element_size()
    return dict(kinds)


def border_copy_bytes(items: Sequence[Fragment]) -> int:
    """Bytes of moments of border rows that another shard keeps too, and owns."""
    factored = any("col_mean_sq" in item.state for item in items)
    return costs.border_copy_bytes((item.holding for item in items), factored)


def show_messages(dist_rank: int) -> None:
    """Let rank 0 say what it does and the others what is wrong, unless the user has configured the logger."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO if dist_rank == 0 else logging.WARNING)
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def start_table(config: LordoConfig, shape: RunShape, size: ModelSize, items: Sequence[Fragment]) -> list[str]:
    """Its lines; `items` are those of this rank."""
    mesh = f" x {shape.tensor_size} tensor-parallel" if shape.tensor_size > 1 else ""
    mesh += f" x {shape.pipe_size} pipeline stages" if shape.pipe_size > 1 else ""
    lines = [
        f"LoRDO: {shape.replicas} replicas of {shape.replica_size} data-parallel ranks{mesh}, {shape.driver}; "
        f"sync every {config.sync_interval} steps{_streaming_in_words(config)}; {config.qh_mode}, omega "
        f"{config.omega:g}, basis from {config.basis_source} ({config.basis_update}), {config.projection} projection",
        f"LoRDO: outer step: {_outer_in_words(config.outer)}",
        f"LoRDO: {size.low_rank_parameters} parameters low-rank ({size.low_rank_elements:,} elements), "
        f"{size.dense_parameters} dense ({size.dense_elements:,} elements)",
    ]
    if shape.pipe_size > 1:
        lines.append("LoRDO: of them on the first pipeline stage:")
    return [*lines, *_plan_lines(items), _state_line(items)]


def _streaming_in_words(config: LordoConfig) -> str:
    fragments, delay = config.streaming.fragments, config.streaming.delay_steps
    words = f", in {fragments} fragments" if fragments > 1 else ""
    return words + (f", applied {delay} steps later" if delay else "")


def _outer_in_words(outer: OuterOptimizer) -> str:
    if outer.is_plain_average:
        return "plain average"
    words = f"lr {outer.lr:g}, momentum {outer.momentum:g}" + (" (Nesterov)" if outer.nesterov else "")
    if outer.residual_gain != 1.0:
        words += f", gain {outer.residual_gain:g} outside the basis"
    return words + (", matrices orthogonalized" if outer.orthogonalize else "")


def _plan_lines(items: Sequence[Fragment]) -> list[str]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for plan in (item.plan for item in items):
        alike = (plan.low_rank, plan.shape, plan.rank, plan.reason, plan.on_larger_side)
        groups.setdefault(alike, []).append(plan.name)
    lines = []
    for (low_rank, shape, rank, reason, larger), names in groups.items():
        kind = f"rank {rank}" if low_rank else "dense"
        mark = " [basis on the larger side]" if larger else ""
        lines.append(f"LoRDO:   {len(names):4d} x {shape!s:16} {kind:9} {reason}{mark}: {names[0]}")
    return lines


def _state_line(items: Sequence[Fragment]) -> str:
    state = ", ".join(f"{kind} {mebibytes(size)}" for kind, size in state_bytes(items).items())
    adamw = costs.adamw_bytes(item.holding for item in items)
    copied = border_copy_bytes(items)
    copies = f" (of it {mebibytes(copied)} border copies)" if copied else ""
    return f"LoRDO: state on this rank: {state}{copies}; AdamW's moments would be {mebibytes(adamw)}"


def mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.2f} MiB"
