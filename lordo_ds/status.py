"""What a run looks like: the layout at start-up, the status of an engine, the events of a sync."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lordo_ds.config import OuterOptimizer
from lordo_ds.dist.fragment import Fragment
from lordo_ds.dist.sync import OuterSync
from lordo_ds.handle import RunHandle
from lordo_ds.optimizer import LoRDO


def state_bytes(optimizer: LoRDO) -> dict[str, int]:
    """Bytes of optimizer state on this rank by kind, counted over the live tensors.

    Moments of parameters that are not projected are listed as `dense_exp_avg` and `dense_exp_avg_sq`.
    """
    kinds: Counter[str] = Counter()
    for item in _items(optimizer):
        for key, value in item.state.items():
            if isinstance(value, Tensor):
                dense_moment = not item.plan.low_rank and key.startswith("exp_avg")
                kinds[f"dense_{key}" if dense_moment else key] += value.numel() * value.element_size()
    return dict(kinds)


def border_copy_bytes(optimizer: LoRDO) -> int:
    """Bytes of moments of border rows that another shard keeps too, and owns."""
    total = 0
    for item in _items(optimizer):
        if item.shards is None or item.shards.basis_on_rows:
            continue
        first, last = item.shards.owned_rows(item.comm.index)
        copies = sum(not first <= row < last for _, row in item.shards.borders(item.comm.index))
        floats = 2 * item.plan.rank + ("col_mean_sq" in item.state)
        total += copies * floats * item.weight.element_size()
    return total


def bytes_inside(sync: OuterSync) -> dict[str, int]:
    """Bytes that LoRDO itself sent from this rank inside its replica, by the group they went to.

    What the engine sends there (activations, gradients, gathered weights) is not among them.
    """
    inside = sync.inside
    return {
        "shard": inside.shard.ledger.total_bytes,
        "tensor": inside.tensor.ledger.total_bytes,
        "pipe": sum(weight.comm.ledger.total_bytes for _, weight in sync.tied_copies.pairs),
        "twins": sync.wire.twins.ledger.total_bytes,
        "everyone": inside.everyone.ledger.total_bytes,
    }


def status_of(hook: RunHandle) -> dict[str, Any]:
    """The dict that `lordo_ds.status(engine)` returns; `hook` is the run's handle."""
    optimizer = hook.optimizer
    sync = optimizer.sync
    assert sync is not None
    report = sync.last_report
    return {
        "replicas": hook.replicas,
        "replica_index": hook.replica_index,
        "shard_size": hook.groups.layout.replica_size,
        "zero_stage": hook.zero_stage,
        "tensor_parallel_size": hook.groups.tensor_size,
        "pipeline_parallel_size": hook.groups.pipe_size,
        "step": optimizer.attempted_steps,
        "executed_steps": optimizer.executed_steps,
        "next_sync_in": optimizer.next_sync_in,
        "syncs": sync.syncs,
        "syncs_with_replicas_left_out": sync.left_out_syncs,
        "nonfinite_syncs_in_a_row": sync.nonfinite_syncs,
        "syncs_left_out_by_replica": list(sync.faults.left_out),
        "syncs_as_outlier_by_replica": list(sync.faults.as_outlier),
        **asdict(optimizer.model_size),
        "state_bytes": state_bytes(optimizer),
        "border_copy_bytes": border_copy_bytes(optimizer),
        "bytes_sent": dict(sync.wire.ledger.by_kind),
        "bytes_sent_total": sync.wire.ledger.total_bytes,
        "bytes_inside": bytes_inside(sync),
        "ddp_bytes_per_step": hook.ddp_bytes_per_step,
        "last_sync": asdict(report) if report else None,
    }


def _outer_in_words(outer: OuterOptimizer) -> str:
    if outer.is_plain_average:
        return "plain average"
    words = f"lr {outer.lr:g}, momentum {outer.momentum:g}" + (" (Nesterov)" if outer.nesterov else "")
    if outer.residual_gain != 1.0:
        words += f", gain {outer.residual_gain:g} outside the basis"
    return words + (", matrices orthogonalized" if outer.orthogonalize else "")


def describe_start(hook: RunHandle) -> list[str]:
    """The start-up table: mesh, what is projected and why, state by kind."""
    now = status_of(hook)
    config = hook.optimizer.config
    tensor, pipe = now["tensor_parallel_size"], now["pipeline_parallel_size"]
    mesh = f" x {tensor} tensor-parallel" if tensor > 1 else ""
    mesh += f" x {pipe} pipeline stages" if pipe > 1 else ""
    lines = [
        f"LoRDO: {now['replicas']} replicas of {now['shard_size']} data-parallel ranks{mesh}, "
        f"ZeRO stage {now['zero_stage']}; "
        f"sync every {config.sync_interval} steps; {config.qh_mode}, omega {config.omega:g}, basis from "
        f"{config.basis_source} ({config.basis_update}), {config.projection} projection",
        f"LoRDO: outer step: {_outer_in_words(config.outer)}",
        f"LoRDO: {now['low_rank_parameters']} parameters low-rank ({now['low_rank_elements']:,} elements), "
        f"{now['dense_parameters']} dense ({now['dense_elements']:,} elements)",
    ]
    groups: dict[tuple[Any, ...], list[str]] = {}
    for item in _items(hook.optimizer):
        plan = item.plan
        groups.setdefault((plan.low_rank, plan.shape, plan.rank, plan.reason, plan.on_larger_side), []).append(
            plan.name
        )
    if pipe > 1:
        lines.append("LoRDO: of them on the first pipeline stage:")
    for (low_rank, shape, rank, reason, larger), names in groups.items():
        kind = f"rank {rank}" if low_rank else "dense"
        mark = " [basis on the larger side]" if larger else ""
        lines.append(f"LoRDO:   {len(names):4d} x {shape!s:16} {kind:9} {reason}{mark}: {names[0]}")
    state = ", ".join(f"{kind} {mebibytes(size)}" for kind, size in now["state_bytes"].items())
    adamw = 2 * sum(item.weight.numel() * item.weight.element_size() for item in _items(hook.optimizer))
    copies = f" (of it {mebibytes(now['border_copy_bytes'])} border copies)" if now["border_copy_bytes"] else ""
    lines.append(f"LoRDO: state on this rank: {state}{copies}; AdamW's moments would be {mebibytes(adamw)}")
    return lines


def sync_events(hook: RunHandle, samples: int) -> list[tuple[str, float, int]]:
    """TensorBoard events of the sync that just ended, over the samples seen."""
    report = hook.optimizer.last_report
    values = {
        "bytes_sent_total": hook.bytes_sent,
        "bytes_saved_factor": hook.ddp_bytes_per_step * report.step / max(1, hook.bytes_sent),
        "sync_seconds": report.seconds,
        "drift": report.drift,
        "basis_overlap": report.overlap,
        "captured_gradient_energy": report.captured_gradient_energy,
        "participants": report.participants,
        "outliers": len(report.outliers),
    }
    return [(f"Train/LoRDO/{name}", float(value), samples) for name, value in values.items() if value is not None]


def mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.2f} MiB"


def _items(optimizer: LoRDO) -> list[Fragment]:
    assert optimizer.sync is not None
    return optimizer.sync.items
