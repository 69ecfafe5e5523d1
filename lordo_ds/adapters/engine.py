"""The hook on a DeepSpeed engine: replicas for its data-parallel world, the sync at the end of each step."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed.comm as deepspeed_comm
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import groups as deepspeed_groups
from torch.utils.data import DistributedSampler

from lordo_ds.config import ConfigError, LordoConfig
from lordo_ds.core.grouping import ParameterFacts, model_facts
from lordo_ds.core.mesh import replica_layout
from lordo_ds.dist.groups import ReplicaGroups, replica_groups
from lordo_ds.dist.ledger import reduction_bytes
from lordo_ds.dist.wire import ReplicaWire
from lordo_ds.optimizer import LoRDO
from lordo_ds.status import describe_start, status_of, sync_events

logger = logging.getLogger("lordo_ds")

_HOOK = "_lordo_hook"
_live: weakref.WeakSet[Any] = weakref.WeakSet()


def live_engines() -> list[Any]:
    """LoRDO engines that still exist in this process."""
    return list(_live)


def requested_optimizer(config: Any, client_optimizer: Any, type_name: str) -> LordoConfig | None:
    """The LoRDO settings an engine is being built with, or None if it is built with another optimizer."""
    if isinstance(client_optimizer, LoRDO):
        return client_optimizer.config
    if client_optimizer is None and str(config.optimizer_name).lower() == type_name:
        return LordoConfig.parse(config.optimizer_params or {})
    return None


def replica_groups_for(settings: LordoConfig, config: Any, model: Any, mpu: Any) -> ReplicaGroups:
    """Refuse what is not supported, then build the groups of the replica mesh. Collective."""
    for refused, what, instead in _unsupported(config, model, mpu):
        if refused:
            raise ConfigError(f"LoRDO: {what} is not supported in this version: {instead}")
    world = deepspeed_comm.get_world_size()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world)))
    layout = replica_layout(range(world), settings.replica_size, per_node)
    if layout.replica_size not in (1, world):
        raise ConfigError(
            f"LoRDO: optimizer.params.replica_size = {settings.replica_size!r} ({layout.replica_size} of {world} ranks) "
            'is not supported in this version: legal are 1 and "all" (nearest: 1)'
        )
    return replica_groups(layout)


def _unsupported(config: Any, model: Any, mpu: Any) -> list[tuple[bool, str, str]]:
    """(is it asked for, what it is called, what to do instead), in DeepSpeed 0.19.8's configuration."""
    stage = int(config.zero_optimization_stage)
    mixture = any(type(module).__name__ in ("MoE", "AutoEPMoELayer") for module in model.modules())
    return [
        (stage != 0, f"zero_optimization.stage = {stage}", "legal is 0 (nearest: 0)"),
        (isinstance(model, PipelineModule), "a PipelineModule", "pass a plain module"),
        (mpu is not None, "an mpu (tensor or pipeline parallelism)", "leave it out"),
        (mixture, "DeepSpeed MoE", "use a dense model"),
        (config.hybrid_engine.enabled, "hybrid_engine", "switch it off"),
        (config.torch_autocast_enabled, "torch_autocast", "use bf16 or fp16"),
        (config.data_efficiency_enabled, "data_efficiency", "switch it off"),
        (config.compile_config.deepcompile, "compile.deepcompile", "switch it off"),
        (config.tensor_parallel_config.autotp_size > 1, "tensor_parallel.autotp_size", "leave it out"),
        (config.load_universal_checkpoint, "checkpoint.load_universal", "switch it off; it knows only Adam's moments"),
        (config.use_node_local_storage, "checkpoint.use_node_local_storage", "switch it off"),
    ]


class EngineHook:
    """Binds one DeepSpeed engine to its replicas.

    Every method replaced is one of this engine instance; nothing outside it changes. The sync runs after
    DeepSpeed's own `_take_model_step`, at every *attempted* step: inside the optimizer's `step()` an fp16
    overflow on one replica would put it out of step with the others.
    """

    def __init__(self, engine: Any, groups: ReplicaGroups) -> None:
        self._engine = weakref.ref(engine)
        self.groups = groups
        self.optimizer: LoRDO = engine.basic_optimizer
        self.row_keys: list[str] = []
        self._ddp_bytes_per_step = 0

    @classmethod
    def attach(cls, engine: Any, groups: ReplicaGroups, training_data: Any) -> EngineHook:
        """Equalise the replicas, allocate the optimizer state, hook the engine, print the layout."""
        hook = cls(engine, groups)
        hook._check_engine(engine)
        setattr(engine, _HOOK, hook)
        _live.add(engine)
        wire = ReplicaWire(groups.replica if groups.layout.replica_count > 1 else None)
        hook._equalise_model(engine, wire)
        hook.optimizer.attach(hook._facts_of_stepped_tensors(engine), wire)
        hook._refresh_low_precision()
        hook._replace_methods(engine)
        if training_data is not None:
            engine.training_data = training_data
            engine.training_dataloader = engine.deepspeed_io(training_data)
        gradient_bytes = sum(p.numel() * p.element_size() for p in engine.module.parameters() if p.requires_grad)
        hook._ddp_bytes_per_step = reduction_bytes(gradient_bytes, hook.data_parallel_size)
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
    def replicas(self) -> int:
        return self.groups.layout.replica_count

    @property
    def replica_index(self) -> int:
        return self.groups.replica_index

    @property
    def data_parallel_size(self) -> int:
        """Data-parallel ranks of all replicas together."""
        return self.groups.layout.replica_count * self.groups.layout.replica_size

    @property
    def data_parallel_rank(self) -> int:
        return self.groups.replica_index * self.groups.layout.replica_size + self.groups.shard_index

    @property
    def synced(self) -> bool:
        return self.optimizer.synced

    @property
    def next_sync_in(self) -> int:
        return self.optimizer.next_sync_in

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank sent across replicas since the start of the run."""
        assert self.optimizer.sync is not None
        return self.optimizer.sync.wire.ledger.total_bytes

    @property
    def ddp_bytes_per_step(self) -> int:
        """Bytes this rank would send per step if the gradients of all ranks were all-reduced."""
        return self._ddp_bytes_per_step

    def record(self, **values: float) -> None:
        """Keep numbers of the step just attempted; their averages over replicas come with the next sync.

        Call it once per step with the same names on every rank.
        """
        keys = sorted(values)
        if self.row_keys and keys != self.row_keys:
            raise ValueError(f"LoRDO: record() got {keys}, earlier {self.row_keys}: give the same names at every step")
        self.row_keys = keys
        assert self.optimizer.sync is not None
        self.optimizer.sync.rows.append([float(values[key]) for key in keys])

    def averaged_rows(self) -> list[dict[str, float]]:
        """Rows that were averaged since the last call, in the order of their steps."""
        assert self.optimizer.sync is not None
        return [dict(zip(self.row_keys, row, strict=True)) for row in self.optimizer.sync.take_averaged_rows()]

    def finish(self) -> None:
        """Sync unless the last step ended in one, so that all replicas hold the same weights. Collective."""
        if self.optimizer.final_sync():
            self._after_sync()
            self._refresh_low_precision()

    # -- attaching -----------------------------------------------------------------------------------

    def _check_engine(self, engine: Any) -> None:
        """Training with gradients reduced over all replicas, or over none, must be impossible."""
        assert type(engine.basic_optimizer) is LoRDO, type(engine.basic_optimizer)
        members = deepspeed_comm.get_all_ranks_from_group(engine.data_parallel_group)
        expected = list(self.groups.layout.shard_group(engine.global_rank))
        if sorted(members) != sorted(expected) or engine.dp_world_size != len(expected):
            raise RuntimeError(f"LoRDO: DeepSpeed reduces gradients over ranks {members}, the replica is {expected}")
        if not isinstance(engine.optimizer, LoRDO | FP16_UnfusedOptimizer):
            raise ConfigError(
                f"LoRDO: DeepSpeed wraps the optimizer in {type(engine.optimizer).__name__}, which is not supported "
                "in this version: use stage 0 with fp32, bf16 or fp16"
            )

    def _equalise_model(self, engine: Any, wire: ReplicaWire) -> None:
        """Parameters (frozen ones too) and buffers become those of replica 0."""
        wrapper = self._wrapper()
        for tensor in itertools.chain(engine.module.parameters(), engine.module.buffers()):
            wire.broadcast_(tensor.data, "start")
        if wrapper is not None:
            for masters, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
                for master, parameter in zip(masters, parameters, strict=True):
                    master.data.copy_(parameter.data)

    def _wrapper(self) -> FP16_UnfusedOptimizer | None:
        wrapper = self.engine.optimizer
        return wrapper if isinstance(wrapper, FP16_UnfusedOptimizer) else None

    def _facts_of_stepped_tensors(self, engine: Any) -> dict[torch.Tensor, ParameterFacts]:
        """Facts of each tensor that the optimizer steps: the parameters, or their fp32 masters."""
        facts = model_facts(engine.module)
        wrapper = self._wrapper()
        if wrapper is None:
            return dict(facts)
        masters = {}
        for stepped, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            masters.update({m: facts[p] for m, p in zip(stepped, parameters, strict=True)})
        return masters

    def _replace_methods(self, engine: Any) -> None:
        take_step, io = engine._take_model_step, engine.deepspeed_io
        set_batch, set_micro = engine.set_train_batch_size, engine.set_train_micro_batch_size
        checkpoint_name, destroy = engine._get_ckpt_name, engine.destroy
        hook = weakref.proxy(self)

        @functools.wraps(take_step)
        def take_model_step(*args: Any, **kwargs: Any) -> Any:
            loss_scale = hook._loss_scale()
            result = take_step(*args, **kwargs)
            if loss_scale is not None and engine._global_grad_norm is not None:
                engine._global_grad_norm /= loss_scale
            hook._end_attempt()
            return result

        @functools.wraps(io)
        def deepspeed_io(*args: Any, **kwargs: Any) -> Any:
            with engine.mpu.over_all_replicas():
                return io(*args, **kwargs)

        @functools.wraps(set_batch)
        def set_train_batch_size(train_batch_size: int) -> None:
            with hook._true_data_parallel_size():
                set_batch(train_batch_size)

        @functools.wraps(set_micro)
        def set_train_micro_batch_size(micro_batch_size: int) -> None:
            with hook._true_data_parallel_size():
                set_micro(micro_batch_size)

        @functools.wraps(checkpoint_name)
        def get_ckpt_name(checkpoints_path: str, tag: str, *args: Any, **kwargs: Any) -> str:
            return checkpoint_name(checkpoints_path, os.path.join(str(tag), hook.checkpoint_folder), *args, **kwargs)

        @functools.wraps(destroy)
        def release() -> None:
            _live.discard(engine)
            if deepspeed_groups.mpu is engine.mpu:
                deepspeed_groups.mpu = None
            destroy()

        if self._loss_scale() is not None:
            engine.backward = self._scaled_backward(engine.backward)
        engine._take_model_step = take_model_step
        engine.destroy = release
        engine.deepspeed_io = deepspeed_io
        engine.set_train_batch_size = set_train_batch_size
        engine.set_train_micro_batch_size = set_train_micro_batch_size
        engine._get_ckpt_name = get_ckpt_name
        engine.clip_fp32_gradients = self._clip_fp32_gradients

    @property
    def checkpoint_folder(self) -> str:
        """Folder of this replica inside a checkpoint tag."""
        return f"replica_{self.replica_index}"

    # -- what the replaced methods do ----------------------------------------------------------------

    def _end_attempt(self) -> None:
        executed = self.optimizer.executed_steps
        if self.optimizer.end_attempt():
            self._refresh_low_precision()
        # A replica that skipped steps takes over the schedule of the one that executed most.
        for _ in range(self.optimizer.executed_steps - executed):
            if self.engine.lr_scheduler is not None:
                self.engine.lr_scheduler.step()
        if self.optimizer.synced:
            self._after_sync()

    def _after_sync(self) -> None:
        engine = self.engine
        if engine.monitor.enabled and engine.global_rank == 0:
            engine.monitor.write_events(sync_events(self, engine.global_samples))

    @torch.no_grad()
    def _refresh_low_precision(self) -> None:
        wrapper = self._wrapper()
        if wrapper is None:
            return
        for masters, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.data.copy_(master.data)

    def _loss_scale(self) -> float | None:
        """The factor that stage 0's fp16 wrapper divides gradients by; None in other precisions."""
        wrapper = self._wrapper()
        if wrapper is None or not wrapper.loss_scale_config.use_grad_scaling:
            return None
        return float(wrapper.loss_scale_config.cur_scale)

    def _scaled_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """DeepSpeed 0.19.8 scales the loss for ZeRO only, yet stage 0's fp16 wrapper unscales the gradients.

        They would be too small by the loss scale: small ones underflow, clipping never acts, eps dominates. The
        gradient that enters the loss is set to what the wrapper expects, whoever else scaled it.
        """

        @functools.wraps(backward)
        def scaled_backward(loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
            share = 1.0 / self.engine.gradient_accumulation_steps() if scale_wrt_gas else 1.0
            factor = share * (self._loss_scale() or 1.0)
            loss = loss.float()
            handle = loss.register_hook(lambda gradient: torch.full_like(gradient, factor))
            try:
                return backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
            finally:
                handle.remove()

        return scaled_backward

    def _clip_fp32_gradients(self) -> None:
        """DeepSpeed's clipping, but the norm that it computes is kept for `get_global_grad_norm`."""
        engine = self.engine
        norm = clip_grad_norm_(parameters=engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu)
        engine._global_grad_norm = float(norm)

    @contextmanager
    def _true_data_parallel_size(self) -> Iterator[None]:
        """Batch sizes are counted over all replicas; DeepSpeed would multiply by the replica's size only."""
        engine = self.engine
        engine.dp_world_size, inside = self.data_parallel_size, engine.dp_world_size
        try:
            yield
        finally:
            engine.dp_world_size = inside


# -- the public functions on an engine -------------------------------------------------------------


def hook(engine: Any) -> EngineHook | None:
    """The hook of a LoRDO engine, or None for an engine with another optimizer."""
    return getattr(engine, "__dict__", {}).get(_HOOK)


def _require_hook(engine: Any) -> EngineHook:
    found = hook(engine)
    if found is None:
        raise ValueError('LoRDO: this engine was not built with "optimizer": {"type": "LoRDO"}')
    return found


def status(engine: Any) -> dict[str, Any]:
    """Sizes of the mesh, steps, parameter counts, state bytes and bytes sent by kind, last sync; plain values."""
    return status_of(_require_hook(engine))


def data_sampler(dataset: Any, engine: Any, shuffle: bool = True, seed: int = 0) -> DistributedSampler[Any]:
    """A sampler that gives every data-parallel rank of every replica its own part of the dataset."""
    found = _require_hook(engine)
    return DistributedSampler(
        dataset, num_replicas=found.data_parallel_size, rank=found.data_parallel_rank, shuffle=shuffle, seed=seed
    )


def save_checkpoint(engine: Any, save_dir: str, tag: str | None = None, **options: Any) -> bool:
    """`engine.save_checkpoint`; every replica writes `<tag>/replica_<m>/`, with its own optimizer state."""
    _require_hook(engine)
    return bool(engine.save_checkpoint(save_dir, tag=tag, **options))


def load_checkpoint(engine: Any, load_dir: str, tag: str | None = None, **options: Any) -> tuple[str | None, Any]:
    """`engine.load_checkpoint` of what `save_checkpoint` wrote."""
    _require_hook(engine)
    return engine.load_checkpoint(load_dir, tag=tag, **options)
