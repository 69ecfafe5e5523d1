"""What a run looks like: the layout at start-up, the status of a run, the events of a sync."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lordo_ds.alone import shape_alone
from lordo_ds.comm.ledger import data_parallel_bytes
from lordo_ds.handle import RunHandle, require_hook
from lordo_ds.optimizer import LoRDO
from lordo_ds.start_table import RunShape, border_copy_bytes, start_table, state_bytes
from lordo_ds.sync.outer_sync import OuterSync


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


def status(engine: Any) -> dict[str, Any]:
    """Sizes of the mesh, steps, parameter counts, state bytes and bytes sent by kind, last sync; plain values.

    Args:
        engine: a DeepSpeed engine, or a LoRDO optimizer that is used alone and has made a step.
    """
    if isinstance(engine, LoRDO) and not engine.managed:
        return status_alone(engine)
    return status_of(require_hook(engine))


def status_of(run: RunHandle) -> dict[str, Any]:
    """The dict that `lordo_ds.status(engine)` returns."""
    return _status(run.optimizer, run.shape, run.ddp_bytes_per_step)


def status_alone(optimizer: LoRDO) -> dict[str, Any]:
    """The same of an optimizer without an engine.

    Raises:
        ValueError: it has made no step, so there is nothing to tell yet.
    """
    sync = optimizer.sync
    if sync is None:
        raise ValueError("LoRDO: the optimizer has not made a step: ask for its status after the first")
    shape = shape_alone(sync)
    gradient_bytes = sum(item.weight.numel() * item.weight.element_size() for item in sync.items)
    return _status(optimizer, shape, data_parallel_bytes(gradient_bytes, shape.replicas, shape.replica_size))


def _status(optimizer: LoRDO, shape: RunShape, ddp_bytes_per_step: int) -> dict[str, Any]:
    sync = optimizer.sync
    assert sync is not None
    report = sync.last_report
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
        "bytes_inside": bytes_inside(sync),
        "ddp_bytes_per_step": ddp_bytes_per_step,
        "last_sync": asdict(report) if report else None,
        "fragments": len(sync.streaming.parts),
        "fragment_in_flight": sync.streaming.fragment_in_flight,
        "sync_blocked_seconds": sync.blocked_seconds,
    }


def describe_start(run: RunHandle) -> list[str]:
    """The start-up table of a run that an engine drives."""
    optimizer = run.optimizer
    assert optimizer.sync is not None
    return start_table(optimizer.config, run.shape, optimizer.model_size, optimizer.sync.items)


def sync_events(hook: RunHandle, samples: int) -> list[tuple[str, float, int]]:
    """TensorBoard events of the sync that just ended, over the samples seen."""
    report = hook.optimizer.last_report
    assert report is not None
    values = {
        "bytes_sent_total": hook.bytes_sent,
        "bytes_saved_factor": hook.ddp_bytes_per_step * report.step / max(1, hook.bytes_sent),
        "sync_seconds": report.seconds,
        "sync_blocked_seconds": report.blocked_seconds,
        "fragment": report.fragment,
        "drift": report.drift,
        "basis_overlap": report.overlap,
        "captured_gradient_energy": report.captured_gradient_energy,
        "participants": report.participants,
        "outliers": len(report.outliers),
    }
    return [(f"Train/LoRDO/{name}", float(value), samples) for name, value in values.items() if value is not None]
