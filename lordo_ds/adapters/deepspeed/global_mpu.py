"""DeepSpeed's global mpu: a replica's stands in it only while its engine is built, or runs what reads it.

DeepSpeed 0.19.8 keeps the mpu of the engine that was built last in `deepspeed.utils.groups.mpu`. Most of it is asked
once, in an engine's constructor; what is asked later is listed here:

    DeepSpeedEngine._reduce_non_expert_gradients   gradients without ZeRO, at every step
    DeepSpeedEngine._save_checkpoint               who writes the model's file
    the trace of ZeRO-3's modules                  through the checks of `zero_init`, until it stands
    ZeRO-3's `enable_sanity_checks`                the same checks, while gradients are reduced

An engine with another optimizer, built before or after ours, thereby keeps the data-parallel group that it had without
us; so do two LoRDO engines with replicas of different sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import groups as deepspeed_groups

from lordo_ds.adapters.deepspeed.pipeline import is_pipeline
from lordo_ds.adapters.patching import replace_method


@contextmanager
def lent(mpu: Any) -> Iterator[None]:
    """DeepSpeed's functions answer for this mpu within the block."""
    before = deepspeed_groups.mpu
    deepspeed_groups.mpu = mpu
    try:
        yield
    finally:
        deepspeed_groups.mpu = before


def users_mpu(engine: Any) -> Any:
    """What the engine would have without us: the user's mpu, a pipeline's grid, or None."""
    return engine.mpu.whole if is_pipeline(engine) else engine.mpu.wrapped


def left_to(users: Any) -> None:
    """An engine stands that was built around a user's mpu, or a pipeline's grid: DeepSpeed leaves that one behind."""
    if users is not None:
        deepspeed_groups.mpu = users


def taken_from(users: Any) -> None:
    """That engine is destroyed: the next one has the data-parallel group of its own mpu, or all ranks."""
    if users is not None and deepspeed_groups.mpu is users:
        deepspeed_groups.mpu = None


def lend_to_engine(engine: Any, version: str) -> None:
    """Let every method of this engine that reads the global find the engine's own mpu there."""

    def with_own(original: Any) -> Any:
        mpu = engine.mpu

        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            with lent(mpu):
                return original(*args, **kwargs)

        return method

    readers: list[tuple[Any, str, tuple[str, ...]]] = [
        (engine, "_reduce_non_expert_gradients", ("grads", "elements_per_buffer")),
        (engine, "_save_checkpoint", ("save_dir", "tag", "client_state", "exclude_frozen_parameters")),
    ]
    wrapper = engine.optimizer
    if type(wrapper) is DeepSpeedZeroOptimizer_Stage3:
        readers.append((wrapper.parameter_offload.get_param_coordinator(), "reset_step", ()))
        if wrapper.enable_sanity_checks:
            readers.append((wrapper, "reduce_ready_partitions_and_remove_grads", ("param",)))
            readers.append((wrapper, "independent_gradient_partition_epilogue", ()))
    for owner, name, parameters in readers:
        replace_method(owner, name, parameters, with_own, version)
