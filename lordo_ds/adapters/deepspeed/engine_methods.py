"""The methods of a DeepSpeed engine that are replaced, on that engine only: what each does beside the original."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

from lordo_ds.adapters.deepspeed import stage0
from lordo_ds.adapters.deepspeed.checkpoint_hooks import keep_replicas_apart
from lordo_ds.adapters.deepspeed.global_mpu import lend_to_engine, taken_from, users_mpu
from lordo_ds.adapters.deepspeed.model_watch import unresized_before
from lordo_ds.adapters.deepspeed.pipeline import give_grid_back, is_pipeline, scale_last_stage
from lordo_ds.adapters.deepspeed.state_access import refuse_optimizer_states
from lordo_ds.adapters.patching import replace_method

if TYPE_CHECKING:
    from lordo_ds.adapters.deepspeed.hook import EngineHook


def replace_methods(engine: Any, hook: EngineHook, version: str) -> None:
    """Let the engine's methods end every attempted step in the hook, and count and save over all replicas."""
    mine: EngineHook = weakref.proxy(hook)  # the engine owns the hook; its methods borrow it
    over_all_ranks = functools.partial(_over_all_ranks, engine, mine)
    for name, parameters, make in (
        ("_take_model_step", ("lr_kwargs",), functools.partial(_with_end_of_attempt, mine)),
        ("deepspeed_io", ("dataset", "batch_size"), functools.partial(_for_all_replicas, engine)),
        ("set_train_batch_size", ("train_batch_size",), over_all_ranks),
        ("set_train_micro_batch_size", ("micro_batch_size",), over_all_ranks),
        ("destroy", (), functools.partial(_and_forget, engine, mine)),
        ("offload_states", ("include", "device"), _refuse_offload_states),
    ):
        replace_method(engine, name, parameters, make, version, passes_on=True)
    lend_to_engine(engine, version)
    keep_replicas_apart(engine, hook.groups, mine.restart_from_weights, version)
    loads, saves = functools.partial(_and_remember, mine), functools.partial(_with_loaded_weights, mine)
    replace_method(engine, "load_checkpoint", ("load_dir", "tag"), loads, version)
    replace_method(engine, "save_checkpoint", ("save_dir", "tag"), saves, version)
    stage0.own_norm(engine, hook.groups.tensor, hook.groups.inside, version, hook.groups.layout.replica_size)
    refuse_optimizer_states(engine, version)
    if not is_pipeline(engine):
        replace_method(engine, "forward", ("args", "kwargs"), unresized_before(engine), version)
    if is_pipeline(engine):
        replace_method(engine, "_build_data_iter", ("dataset",), over_all_ranks, version, True)
    if stage0.loss_scale(engine) is None:
        return
    if is_pipeline(engine):
        scale_last_stage(engine, functools.partial(stage0.loss_scale, engine), version)
    else:
        engine.backward = stage0.scaled_backward(engine, engine.backward)


def _with_end_of_attempt(hook: EngineHook, take_step: Any) -> Any:
    @functools.wraps(take_step)
    def take_model_step(lr_kwargs: Any) -> Any:
        hook.optimizer.begin_attempt()
        result = take_step(lr_kwargs)
        hook.end_attempt()
        return result

    return take_model_step


def _for_all_replicas(engine: Any, io: Any) -> Any:
    @functools.wraps(io)
    def deepspeed_io(*args: Any, **kwargs: Any) -> Any:
        with engine.mpu.over_all_replicas():
            return io(*args, **kwargs)

    return deepspeed_io


def _over_all_ranks(engine: Any, hook: EngineHook, original: Any) -> Any:
    @functools.wraps(original)
    def count_all(*args: Any, **kwargs: Any) -> Any:
        with hook.true_data_parallel_size(), engine.mpu.over_all_replicas():
            return original(*args, **kwargs)

    return count_all


def _and_remember(hook: EngineHook, load: Any) -> Any:
    @functools.wraps(load)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        hook.drain(before_load=True)
        result = load(*args, **kwargs)
        if result[0] is not None:
            hook.remember_weights()
        return result

    return load_checkpoint


def _with_loaded_weights(hook: EngineHook, save: Any) -> Any:
    @functools.wraps(save)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        # Later the weights of an evaluation may be in the model just now.
        if hook.optimizer.attempted_steps == 0:
            hook.optimizer.begin_attempt()
            hook.remember_weights()
        hook.drain()
        return save(*args, **kwargs)

    return save_checkpoint


def _and_forget(engine: Any, hook: EngineHook, destroy: Any) -> Any:
    @functools.wraps(destroy)
    def release() -> None:
        hook.optimizer.watchdog.stop()
        taken_from(users_mpu(engine))
        if is_pipeline(engine):
            give_grid_back(engine.module)
        destroy()

    return release


def _refuse_offload_states(original: Any) -> Any:
    @functools.wraps(original)
    def offload_states(*args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "LoRDO: engine.offload_states() is not supported in this version: use zero_optimization.offload_optimizer"
        )

    return offload_states
