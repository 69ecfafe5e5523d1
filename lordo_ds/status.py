"""What a run looks like: the layout at start-up, the status of a run, the events of a sync."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from lordo_ds import costs
from lordo_ds.alone import shape_alone
from lordo_ds.comm.ledger import ByteLedger, data_parallel_bytes
from lordo_ds.handle import RunHandle, require_hook
from lordo_ds.optimizer import LoRDO
from lordo_ds.start_table import RunShape, border_copy_bytes, start_table, state_bytes
from lordo_ds.sync.outer_sync import OuterSync
from lordo_ds.sync.traffic import REPLICAS, ledgers_inside


def bytes_inside(sync: OuterSync) -> dict[str, int]:
    """Bytes that LoRDO itself sent from this rank inside its replica, by the group they went to.

    What the engine sends there (activations, gradients, gathered weights) is not among them.
    """
    return {axis: sum(ledger.total_bytes for ledger in ledgers) for axis, ledgers in _inside(sync).items()}


def seconds_blocked_inside(sync: OuterSync) -> dict[str, float]:
    """Seconds for which that blocked this rank."""
    return {axis: sum(ledger.total_seconds for ledger in ledgers) for axis, ledgers in _inside(sync).items()}


def _inside(sync: OuterSync) -> dict[str, list[ByteLedger]]:
    return ledgers_inside(sync.wire, sync.inside, sync.tied_copies)


def other_methods_bytes(optimizer: LoRDO, shape: RunShape, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per step that this rank would send across replicas with AdamW-DDP, low-rank DDP and DiLoCo.

    Args:
        dtype: in which they send gradients or weights.
    """
    return costs.other_methods_bytes(
        optimizer.config, optimizer.plans, shape.replicas, shape.replica_size, dtype.itemsize
    )


def status(engine: Any) -> dict[str, Any]:
    """Sizes of the mesh, steps, parameter counts, state, traffic, last sync; plain values, of this rank.

    Of the traffic:
        bytes_sent, bytes_sent_total: across replicas since the start of the run, by what was sent, and in all.
        bytes_per_step: the same, average over the last round (after one sync up to the next, with that sync).
        ddp_bytes_per_step: what all-reducing the engine's gradients would send.
        other_methods_bytes_per_step: what `adamw_ddp`, `low_rank_ddp` and `diloco` would send in `other_methods_dtype`.
        bytes_inside: by the group inside the replica that it was sent in; one group may serve as two.
        bytes_inside_by_kind: by that and by what was sent; a group that serves as two is under the first.
        seconds_blocked, seconds_blocked_total: for which sending and receiving across replicas blocked this rank,
            waiting for late replicas included, since the start of the process; as `bytes_sent`. With NCCL, which sends
            in the background, the time to begin it.
        seconds_blocked_per_step: the same, average over the last round.
        seconds_blocked_inside: as `bytes_inside`.
        last_step: `bytes` and `seconds_blocked` of the last attempted step by axis (`replicas`, and the groups inside,
            a group that serves as two under the first) and by what was sent.

    Args:
        engine: a DeepSpeed engine, or a LoRDO optimizer that is used alone and has made a step.
    """
    if isinstance(engine, LoRDO) and not engine.managed:
        return status_alone(engine)
    return status_of(require_hook(engine))


def status_of(run: RunHandle) -> dict[str, Any]:
    """The dict that `lordo_ds.status(engine)` returns."""
    return _status(run.optimizer, run.shape, run.ddp_bytes_per_step, run.gradient_dtype)


def status_alone(optimizer: LoRDO) -> dict[str, Any]:
    """The same of an optimizer without an engine.

    Raises:
        ValueError: it has made no step, so there is nothing to tell yet.
    """
    sync = optimizer.sync
    if sync is None:
        raise ValueError("LoRDO: the optimizer has not made a step: ask for its status after the first")
    shape = shape_alone(sync)
    gradient_bytes = sum(item.plan.numel * item.weight.element_size() for item in sync.items)
    ddp_bytes_per_step = data_parallel_bytes(gradient_bytes, shape.replicas, shape.replica_size)
    dtype = next((item.weight.dtype for item in sync.items), torch.float32)
    return _status(optimizer, shape, ddp_bytes_per_step, dtype)


def _status(optimizer: LoRDO, shape: RunShape, ddp_bytes_per_step: int, gradient_dtype: torch.dtype) -> dict[str, Any]:
    sync = optimizer.sync
    assert sync is not None
    report, last_step = sync.last_report, sync.traffic.last_step
    return {
        "replicas": shape.replicas,
        "replica_index": shape.replica_index,
        "shard_size": shape.replica_size,
        "zero_stage": shape.zero_stage,
        "tensor_parallel_size": shape.tensor_size,
        "pipeline_parallel_size": shape.pipe_size,
        "step": optimizer.attempted_steps,
        "executed_steps": optimizer.executed_steps,
        "next_sync_in": optimizer.next_sync_in,
        "syncs": sync.syncs,
        "syncs_with_replicas_left_out": sync.left_out_syncs,
        "nonfinite_syncs_in_a_row": sync.nonfinite_syncs,
        "syncs_left_out_by_replica": list(sync.faults.left_out),
        "syncs_as_outlier_by_replica": list(sync.faults.as_outlier),
        **asdict(optimizer.model_size),
        "state_bytes": state_bytes(sync.items),
        "border_copy_bytes": border_copy_bytes(sync.items),
        "bytes_sent": dict(sync.wire.ledger.by_kind),
        "bytes_sent_total": sync.wire.ledger.total_bytes,
        "bytes_per_step": sync.traffic.bytes_per_step,
        "bytes_inside": bytes_inside(sync),
        "bytes_inside_by_kind": {axis: one.bytes for axis, one in sync.counted().items() if axis != REPLICAS},
        "ddp_bytes_per_step": ddp_bytes_per_step,
        "other_methods_bytes_per_step": other_methods_bytes(optimizer, shape, gradient_dtype),
        "other_methods_dtype": str(gradient_dtype).removeprefix("torch."),
        "seconds_blocked": dict(sync.wire.ledger.seconds_by_kind),
        "seconds_blocked_total": sync.wire.ledger.total_seconds,
        "seconds_blocked_per_step": sync.traffic.blocked_per_step_s,
        "seconds_blocked_inside": seconds_blocked_inside(sync),
        "last_step": {
            "bytes": {axis: amounts.bytes for axis, amounts in last_step.items()},
            "seconds_blocked": {axis: amounts.seconds for axis, amounts in last_step.items()},
        },
        "last_sync": asdict(report) if report else None,
        "fragments": len(sync.streaming.parts),
        "fragment_in_flight": sync.streaming.fragment_in_flight,
    }


def describe_start(run: RunHandle) -> list[str]:
    """The start-up table of a run that an engine drives."""
    optimizer = run.optimizer
    assert optimizer.sync is not None
    return start_table(optimizer.config, run.shape, optimizer.model_size, optimizer.sync.items)


def sync_events(hook: RunHandle, samples: int) -> list[tuple[str, float, int]]:
    """TensorBoard events of the sync that just ended, over the samples seen."""
    sync, report = hook.optimizer.sync, hook.optimizer.last_report
    assert sync is not None and report is not None
    traffic, others = sync.traffic, other_methods_bytes(hook.optimizer, hook.shape, hook.gradient_dtype)
    values = {
        "bytes_sent_total": hook.bytes_sent,
        "bytes_saved_factor": hook.ddp_bytes_per_step * report.step / max(1, hook.bytes_sent),
        "bytes_per_step": traffic.bytes_per_step,
        "seconds_blocked_per_step": traffic.blocked_per_step_s,
        **{f"{name}_bytes_per_step": value for name, value in others.items()},
        "sync_seconds": report.seconds,
        "sync_seconds_blocked": report.seconds_blocked,
        "fragment": report.fragment,
        "drift": report.drift,
        "basis_overlap": report.overlap,
        "captured_gradient_energy": report.captured_gradient_energy,
        "participants": report.participants,
        "outliers": len(report.outliers),
    }
    return [(f"Train/LoRDO/{name}", float(value), samples) for name, value in values.items() if value is not None]
