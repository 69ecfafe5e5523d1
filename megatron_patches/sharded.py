"""A save by Megatron's `dist_checkpointing` holds one copy of what all data-parallel ranks share: a sync makes one.

Between syncs every replica has a model of its own, and a sharded checkpoint would keep replica 0's as everybody's,
without a word. What is patched is the first function that `save` calls on all ranks: scripts import `save` itself
by name.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from megatron.core.dist_checkpointing import serialization

from lordo_ds.errors import CheckpointError
from lordo_ds.optimizer import LoRDO
from megatron_patches.versions import require_parameters

_NAME = "save_preprocess"
_PARAMETERS = ("sharded_state_dict", "validate_access_integrity", "preprocess_common_before_consistancy_check")
_trained: weakref.WeakSet[LoRDO] = weakref.WeakSet()


def refuse_between_syncs(optimizer: LoRDO) -> None:
    """From now on, while this optimizer exists, refuse a sharded save in which its replicas differ.

    Raises:
        MegatronMismatchError: this megatron-core is not one this was written for.
    """
    original = getattr(serialization, _NAME)
    if not hasattr(original, "lordo_original"):
        require_parameters(serialization, _NAME, _PARAMETERS)
        setattr(serialization, _NAME, _refusing(original))
    _trained.add(optimizer)


def allow_between_syncs() -> None:
    """Put Megatron's function back."""
    original = getattr(getattr(serialization, _NAME), "lordo_original", None)
    if original is not None:
        setattr(serialization, _NAME, original)
    _trained.clear()


def _refusing(original: Any) -> Any:
    @functools.wraps(original)
    def save_preprocess(*args: Any, **kwargs: Any) -> Any:
        for optimizer in _trained:
            _check(optimizer)
        return original(*args, **kwargs)

    save_preprocess.lordo_original = original  # type: ignore[attr-defined]
    return save_preprocess


def _check(optimizer: LoRDO) -> None:
    sync, step = optimizer.sync, optimizer.attempted_steps
    if sync is None or sync.wire.replicas == 1 or step == sync.last_synced_step:
        return
    when = f"at a sync (the next one ends step {step + optimizer.next_sync_in})"
    if optimizer.config.streaming.is_on:  # a sync of a fragment leaves the others as they are
        when = "after the handle's finish()"
    raise CheckpointError(
        f"LoRDO: dist_checkpointing.save at step {step}, {step - sync.last_synced_step} after the last sync: the "
        f"replicas differ, and it would keep replica 0's as everybody's: save {when}, or save state_dict() in one "
        "file per rank"
    )
