"""Checkpoints of a DeepSpeed engine that was built with LoRDO."""

from __future__ import annotations

from typing import Any

from lordo_ds.adapters.deepspeed.loading_reshaped import load_reshaped
from lordo_ds.handle import require_hook
from lordo_ds.watch.liveness import LOAD


def save_checkpoint(engine: Any, save_dir: str, tag: str | None = None, **options: Any) -> bool:
    """`engine.save_checkpoint`; every replica writes `<tag>/replica_<m>/`, with its own optimizer state."""
    require_hook(engine, "save_checkpoint()")
    return bool(engine.save_checkpoint(save_dir, tag=tag, **options))


def load_checkpoint(
    engine: Any, load_dir: str, tag: str | None = None, *, reshape: bool = False, strict: bool = True, **options: Any
) -> tuple[str | None, Any]:
    """`engine.load_checkpoint` of what `save_checkpoint` wrote.

    Args:
        reshape: load what was saved with another number of replicas or shards, ZeRO stage, TP or PP size, precision or
            rank, or a portable checkpoint; exact, but for a number of replicas that changes between syncs (they start
            from the mean) and a rank that changes. Random generators go on only where the replicas are as many.
        strict: frozen parameters and buffers that are missing in the checkpoint, or not in the model, are refused;
            otherwise the log says which, and they stay as they are (without `reshape`, all parameters: DeepSpeed's
            `load_module_strict`). Other shapes are refused in any case.
    """
    found = require_hook(engine, "load_checkpoint()")
    if not reshape:
        as_saved: tuple[str | None, Any] = engine.load_checkpoint(
            load_dir, tag=tag, **{"load_module_strict": strict, **options}
        )
        return as_saved
    if options:
        raise ValueError(f"LoRDO: load_checkpoint(reshape=True) takes no {sorted(options)[0]!r}: leave it out")
    found.drain(before_load=True)
    with found.optimizer.watchdog.during(LOAD):
        loaded = load_reshaped(engine, found.groups, load_dir, tag, strict)
        found.remember_weights()
    return loaded
