"""The public functions on a DeepSpeed engine that is, or is to be, built with LoRDO."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DistributedSampler

from lordo_ds.adapters.deepspeed.hook import EngineHook, hook
from lordo_ds.adapters.deepspeed.reshape import load_reshaped
from lordo_ds.adapters.deepspeed.zero_init import zero_init_group
from lordo_ds.optimizer import LoRDO
from lordo_ds.status import status_alone, status_of
from lordo_ds.watch.liveness import LOAD

__all__ = ["data_sampler", "hook", "load_checkpoint", "save_checkpoint", "status", "zero_init_group"]


# What does the same where there is no engine.
_ALONE = {
    "data_sampler()": ", and without one a DistributedSampler over all ranks does the same",
    "save_checkpoint()": ", and without one every rank saves its model's and this state_dict() in a file of its own",
    "load_checkpoint()": ", and without one every rank loads its own file, the model first",
}


def _require_hook(engine: Any, what: str = "this function") -> EngineHook:
    found = hook(engine)
    if found is None and isinstance(engine, LoRDO):
        raise ValueError(f"LoRDO: got a LoRDO optimizer: {what} takes a DeepSpeed engine{_ALONE.get(what, '')}")
    if found is None:
        raise ValueError('LoRDO: this engine was not built with "optimizer": {"type": "LoRDO"}')
    return found


def status(engine: Any) -> dict[str, Any]:
    """Sizes of the mesh, steps, parameter counts, state bytes and bytes sent by kind, last sync; plain values.

    Args:
        engine: a DeepSpeed engine, or a LoRDO optimizer that is used alone and has made a step.
    """
    if isinstance(engine, LoRDO) and not engine.managed:
        return status_alone(engine)
    return status_of(_require_hook(engine))


def data_sampler(dataset: Any, engine: Any, shuffle: bool = True, seed: int = 0) -> DistributedSampler[Any]:
    """A sampler that gives every data-parallel rank of every replica its own part of the dataset."""
    found = _require_hook(engine, "data_sampler()")
    return DistributedSampler(
        dataset, num_replicas=found.data_parallel_size, rank=found.data_parallel_rank, shuffle=shuffle, seed=seed
    )


def save_checkpoint(engine: Any, save_dir: str, tag: str | None = None, **options: Any) -> bool:
    """`engine.save_checkpoint`; every replica writes `<tag>/replica_<m>/`, with its own optimizer state."""
    _require_hook(engine, "save_checkpoint()")
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
    found = _require_hook(engine, "load_checkpoint()")
    if not reshape:
        return engine.load_checkpoint(load_dir, tag=tag, **{"load_module_strict": strict, **options})
    if options:
        raise ValueError(f"LoRDO: load_checkpoint(reshape=True) takes no {sorted(options)[0]!r}: leave it out")
    with found.optimizer.watchdog.during(LOAD):
        loaded = load_reshaped(engine, found.groups, load_dir, tag, strict)
        found.remember_weights()
    return loaded
