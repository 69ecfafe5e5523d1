"""The hook on a DeepSpeed engine: replicas for its data-parallel world, the sync at the end of each step."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from lordo_ds.adapters.deepspeed import stage0
from lordo_ds.adapters.deepspeed.checkpoint_hooks import keep_replicas_apart
from lordo_ds.adapters.deepspeed.global_mpu import lend_to_engine, taken_from, users_mpu
from lordo_ds.adapters.deepspeed.masters import (
    gather_again_what_was_gathered,
    refresh_low_precision,
    take_masters_from_model,
)
from lordo_ds.adapters.deepspeed.model_watch import unresized_before, watch_engine
from lordo_ds.adapters.deepspeed.pipeline import give_grid_back, is_pipeline, scale_last_stage, tied_copies
from lordo_ds.adapters.deepspeed.saved_files import tell_header
from lordo_ds.adapters.deepspeed.start import configuration_texts
from lordo_ds.adapters.deepspeed.state_access import refuse_optimizer_states
from lordo_ds.adapters.deepspeed.support import check_engine
from lordo_ds.adapters.deepspeed.wrappers import (
    flat_tensors,
    gradient_bytes,
    shard_groups,
    stepped_tensors_in_groups,
)
from lordo_ds.adapters.patching import replace_method
from lordo_ds.checkpoint.header import RESHAPE_HINT
from lordo_ds.comm.connect import connect
from lordo_ds.comm.equalise import equalise_untrained, warn_of_left_out
from lordo_ds.comm.groups import ReplicaGroups, make_groups
from lordo_ds.comm.inside import InsideComm
from lordo_ds.comm.ledger import data_parallel_bytes
from lordo_ds.core.grouping import model_facts
from lordo_ds.handle import HANDLE, RunHandle
from lordo_ds.replica.copies import TiedWeight
from lordo_ds.start_table import show_messages
from lordo_ds.status import describe_start, sync_events

logger = logging.getLogger("lordo_ds")

DEEPSPEED_VERSION = "DeepSpeed 0.19.8"


class EngineHook(RunHandle):
    """Binds one DeepSpeed engine to its replicas.

    Every method replaced is one of this engine instance; nothing outside it changes. The sync runs after
    DeepSpeed's own `_take_model_step`, at every *attempted* step: inside the optimizer's `step()` an fp16
    overflow on one replica would put it out of step with the others.
    """

    def __init__(self, engine: Any, groups: ReplicaGroups) -> None:
        super().__init__(engine.basic_optimizer, groups)
        self._engine = weakref.ref(engine)

    @classmethod
    def attach(cls, engine: Any, groups: ReplicaGroups, training_data: Any) -> EngineHook:
        """Equalise the replicas, allocate the optimizer state, hook the engine, print the layout. Collective."""
        check_engine(engine, groups)
        show_messages(engine.global_rank)
        hook = cls(engine, groups)
        setattr(engine, HANDLE, hook)
        hook._attach_optimizer(engine)
        hook._replace_methods(engine)
        if training_data is not None:
            engine.training_data = training_data
            engine.training_dataloader = engine.deepspeed_io(training_data)
            if is_pipeline(engine):
                engine._build_data_iter(training_data)
        layout = groups.layout
        hook.ddp_bytes_per_step = data_parallel_bytes(gradient_bytes(engine), hook.replicas, layout.replica_size)
        if engine.global_rank == 0:
            for line in describe_start(hook):
                logger.info(line)
        return hook

    def _attach_optimizer(self, engine: Any) -> None:
        groups, facts = self.groups, model_facts(engine.module, self.groups.tensor_size)
        wire, inside = connect(groups, engine.device, sharded=bool(shard_groups(engine)))
        flats = flat_tensors(engine, facts)
        names = {piece.facts.name for flat in flats for piece in flat.pieces}
        trained = {parameter for parameter, fact in facts.items() if fact.name in names}
        left_out = [
            fact.name for p, fact in facts.items() if p.requires_grad and p not in trained and 0 not in fact.shape
        ]
        warn_of_left_out(left_out)
        equalise_untrained(engine.module, trained, wire, engine.device)
        tied = _tied_weights({facts[p].name: ranks for p, ranks in tied_copies(engine.module)}, inside.shard)
        self.optimizer.resume_hint = RESHAPE_HINT
        with stepped_tensors_in_groups(engine):
            self.optimizer.attach(flats, wire, inside, tied)
        tell_header(engine, groups, facts, trained)
        gather_again_what_was_gathered(engine, DEEPSPEED_VERSION)
        refresh_low_precision(engine)
        assert self.optimizer.sync is not None
        watch_engine(engine, self.optimizer.sync.outside, facts)
        self.remember_weights()

    # -- what users and the training script read -----------------------------------------------------

    @property
    def engine(self) -> Any:
        engine = self._engine()
        assert engine is not None
        return engine

    @property
    def zero_stage(self) -> int:
        return int(self.engine.zero_optimization_stage())

    def setting_texts(self) -> dict[str, str]:
        return configuration_texts(self.engine._config)

    def _after_final_sync(self, steps_taken_over: int) -> None:
        self._after_sync()
        self.take_over(steps_taken_over)

    # -- the engine's methods ------------------------------------------------------------------------

    def _replace_methods(self, engine: Any) -> None:
        hook = weakref.proxy(self)

        def with_end_of_attempt(take_step: Any) -> Any:
            @functools.wraps(take_step)
            def take_model_step(lr_kwargs: Any) -> Any:
                hook.optimizer.begin_attempt()
                result = take_step(lr_kwargs)
                hook._end_attempt()
                return result

            return take_model_step

        def for_all_replicas(io: Any) -> Any:
            @functools.wraps(io)
            def deepspeed_io(*args: Any, **kwargs: Any) -> Any:
                with engine.mpu.over_all_replicas():
                    return io(*args, **kwargs)

            return deepspeed_io

        def over_all_ranks(original: Any) -> Any:
            @functools.wraps(original)
            def count_all(*args: Any, **kwargs: Any) -> Any:
                with hook._true_data_parallel_size(), engine.mpu.over_all_replicas():
                    return original(*args, **kwargs)

            return count_all

        def and_remember(load: Any) -> Any:
            @functools.wraps(load)
            def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
                result = load(*args, **kwargs)
                if result[0] is not None:
                    hook.remember_weights()
                return result

            return load_checkpoint

        def with_loaded_weights(save: Any) -> Any:
            @functools.wraps(save)
            def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
                # Later the weights of an evaluation may be in the model just now.
                if hook.optimizer.attempted_steps == 0:
                    hook.optimizer.begin_attempt()
                    hook.remember_weights()
                return save(*args, **kwargs)

            return save_checkpoint

        def and_forget(destroy: Any) -> Any:
            @functools.wraps(destroy)
            def release() -> None:
                hook.optimizer.watchdog.stop()
                taken_from(users_mpu(engine))
                if is_pipeline(engine):
                    give_grid_back(engine.module)
                destroy()

            return release

        for name, parameters, make in (
            ("_take_model_step", ("lr_kwargs",), with_end_of_attempt),
            ("deepspeed_io", ("dataset", "batch_size"), for_all_replicas),
            ("set_train_batch_size", ("train_batch_size",), over_all_ranks),
            ("set_train_micro_batch_size", ("micro_batch_size",), over_all_ranks),
            ("destroy", (), and_forget),
            ("offload_states", ("include", "device"), _refuse_offload_states),
        ):
            replace_method(engine, name, parameters, make, DEEPSPEED_VERSION, passes_on=True)
        lend_to_engine(engine, DEEPSPEED_VERSION)
        keep_replicas_apart(engine, self.groups, hook._restart_from_weights, DEEPSPEED_VERSION)
        replace_method(engine, "load_checkpoint", ("load_dir", "tag"), and_remember, DEEPSPEED_VERSION)
        replace_method(engine, "save_checkpoint", ("save_dir", "tag"), with_loaded_weights, DEEPSPEED_VERSION)
        stage0.own_norm(
            engine, self.groups.tensor, self.groups.inside, DEEPSPEED_VERSION, self.groups.layout.replica_size
        )
        refuse_optimizer_states(engine, DEEPSPEED_VERSION)
        if not is_pipeline(engine):
            replace_method(engine, "forward", ("args", "kwargs"), unresized_before(engine), DEEPSPEED_VERSION)
        if is_pipeline(engine):
            replace_method(engine, "_build_data_iter", ("dataset",), over_all_ranks, DEEPSPEED_VERSION, True)
        if stage0.loss_scale(engine) is None:
            return
        if is_pipeline(engine):
            scale_last_stage(engine, functools.partial(stage0.loss_scale, engine), DEEPSPEED_VERSION)
        else:
            engine.backward = stage0.scaled_backward(engine, engine.backward)

    def _end_attempt(self) -> None:
        # DeepSpeed has moved the schedule if it executed this step.
        scheduled = self.optimizer.executed_steps + int(self.engine.was_step_applied())
        if self.optimizer.end_attempt():
            refresh_low_precision(self.engine)
        self.remember_weights()
        # A replica that skipped steps takes over the schedule of the one that executed most.
        self._move_schedule(self.optimizer.executed_steps - scheduled)
        if self.optimizer.synced:
            self._after_sync()

    def take_over(self, steps: int) -> None:
        """The optimizer was given weights, and the state of a replica that had executed `steps` more."""
        refresh_low_precision(self.engine)
        self.remember_weights()
        self._move_schedule(steps)

    def remember_weights(self) -> None:
        """Only a step, a sync or a load of ours may change the weights from here on."""
        assert self.optimizer.sync is not None
        self.optimizer.sync.outside.record()

    def _move_schedule(self, steps: int) -> None:
        for _ in range(steps):
            if self.engine.lr_scheduler is not None:
                self.engine.lr_scheduler.step()

    def _restart_from_weights(self) -> None:
        """The model was given weights without optimizer states: make replicas and masters agree, and anchor there."""
        take_masters_from_model(self.engine)
        assert self.optimizer.sync is not None
        if not self.optimizer.sync.start():
            logger.warning("LoRDO: the replicas loaded different weights; all now have those of replica 0")
        refresh_low_precision(self.engine)

    def _after_sync(self) -> None:
        engine = self.engine
        if engine.monitor.enabled and engine.global_rank == 0:
            engine.monitor.write_events(sync_events(self, engine.global_samples))

    @contextmanager
    def _true_data_parallel_size(self) -> Iterator[None]:
        """Batch sizes are counted over all replicas; DeepSpeed would multiply by the replica's size only."""
        engine = self.engine
        engine.dp_world_size, inside = self.data_parallel_size, engine.dp_world_size
        try:
            yield
        finally:
            engine.dp_world_size = inside


def _tied_weights(stage_ranks: dict[str, tuple[int, ...]], shard: InsideComm) -> list[TiedWeight]:
    """With the copies of all shards, which the stages cut in different places. Collective over all ranks."""
    holders = [list(stage_ranks.values())]
    if shard.size > 1:
        holders = [[]] * shard.size
        dist.all_gather_object(holders, list(stage_ranks.values()), group=shard.group)
    groups = make_groups([sorted(rank for ranks in same for rank in ranks) for same in zip(*holders, strict=True)])
    me = dist.get_rank()
    return [
        TiedWeight(name, InsideComm(group), ranks.index(me), len(ranks))
        for (name, ranks), group in zip(stage_ranks.items(), groups, strict=True)
    ]


def _refuse_offload_states(original: Any) -> Any:
    @functools.wraps(original)
    def offload_states(*args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "LoRDO: engine.offload_states() is not supported in this version: use zero_optimization.offload_optimizer"
        )

    return offload_states
