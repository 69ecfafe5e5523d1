"""The hook on a DeepSpeed engine: replicas for its data-parallel world, the sync at the end of each step."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lordo_ds.adapters.deepspeed.attach import attach_optimizer
from lordo_ds.adapters.deepspeed.engine_methods import replace_methods
from lordo_ds.adapters.deepspeed.masters import refresh_low_precision, take_masters_from_model
from lordo_ds.adapters.deepspeed.pipeline import is_pipeline
from lordo_ds.adapters.deepspeed.start import configuration_texts
from lordo_ds.adapters.deepspeed.support import check_engine
from lordo_ds.adapters.deepspeed.wrappers import gradient_bytes, gradient_dtype
from lordo_ds.comm.groups import ReplicaGroups
from lordo_ds.comm.ledger import data_parallel_bytes
from lordo_ds.handle import HANDLE, RunHandle
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
        attach_optimizer(engine, groups, DEEPSPEED_VERSION)
        hook.remember_weights()
        replace_methods(engine, hook, DEEPSPEED_VERSION)
        if training_data is not None:
            engine.training_data = training_data
            engine.training_dataloader = engine.deepspeed_io(training_data)
            if is_pipeline(engine):
                engine._build_data_iter(training_data)
        layout = groups.layout
        hook.ddp_bytes_per_step = data_parallel_bytes(gradient_bytes(engine), hook.replicas, layout.replica_size)
        hook.gradient_dtype = gradient_dtype(engine)
        if engine.global_rank == 0:
            for line in describe_start(hook):
                logger.info(line)
        return hook

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

    # -- what the engine's methods call --------------------------------------------------------------

    def end_attempt(self) -> None:
        """The sync that is due, and what follows from it for the engine. Collective."""
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

    def restart_from_weights(self) -> None:
        """The model was given weights without optimizer states: make replicas and masters agree, and anchor there."""
        take_masters_from_model(self.engine)
        assert self.optimizer.sync is not None
        self.optimizer.sync.start(came_by="loaded")
        refresh_low_precision(self.engine)

    def _after_sync(self) -> None:
        engine = self.engine
        if engine.monitor.enabled and engine.global_rank == 0:
            engine.monitor.write_events(sync_events(self, engine.global_samples))

    @contextmanager
    def true_data_parallel_size(self) -> Iterator[None]:
        """Batch sizes are counted over all replicas; DeepSpeed would multiply by the replica's size only."""
        engine = self.engine
        engine.dp_world_size, inside = self.data_parallel_size, engine.dp_world_size
        try:
            yield
        finally:
            engine.dp_world_size = inside
