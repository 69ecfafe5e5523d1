"""What LoRDO runs with: refusals before an engine is built, checks of the one that was built.

Training with gradients reduced over all replicas, or over none, is the worst outcome; so everything that is not known
to work is refused, in one line that names what to do.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.model_checkpointing.constants import CHECKPOINT_WRITER
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.utils.bwc import (
    bwc_pipeline_parallel_world_size,
    bwc_tensor_model_parallel_group,
    bwc_tensor_model_parallel_world_size,
)
from torch import nn

from lordo_ds.adapters.deepspeed.pipeline import ReplicaGrid, check_pipeline, is_pipeline
from lordo_ds.adapters.deepspeed.wrappers import shard_groups
from lordo_ds.comm.groups import ReplicaGroups, replica_groups
from lordo_ds.comm.nodes import layout_of_replicas
from lordo_ds.config import JSON_PATH, LordoConfig
from lordo_ds.errors import ConfigError
from lordo_ds.optimizer import LoRDO


def asks_for_lordo(config: Any, client_optimizer: Any, type_name: str) -> bool:
    """Whether an engine is being built with LoRDO, or its configuration says so."""
    return isinstance(client_optimizer, LoRDO) or str(config.optimizer_name).lower() == type_name


def requested_settings(config: Any, client_optimizer: Any) -> LordoConfig:
    """The settings of an engine that is being built with LoRDO.

    Raises:
        ConfigError: they are not legal; or the configuration asks for LoRDO and the caller gives another optimizer.
            DeepSpeed lets that one win, and ZeRO-3, which reads the configuration, would cut the parameters by LoRDO's
            replicas all the same.
    """
    if isinstance(client_optimizer, LoRDO):
        if client_optimizer.ranks.on_mesh:
            raise ConfigError(
                "LoRDO: deepspeed.initialize was given LoRDO(..., mesh=...), a mesh of fully_shard: leave the mesh "
                "out, and say replica_size"
            )
        return client_optimizer.config
    if client_optimizer is None:
        return LordoConfig.parse(config.optimizer_params or {})
    is_optimizer = isinstance(client_optimizer, torch.optim.Optimizer)
    given = type(client_optimizer).__name__ if is_optimizer else "a function that makes an optimizer"
    raise ConfigError(
        f"LoRDO: the configuration asks for LoRDO, and deepspeed.initialize was given {given}, which would train in "
        "its place: leave one of them out"
    )


def refuse_hidden_optimizer(engine: Any) -> None:
    """An engine that was built as another optimizer's, but steps LoRDO: it averages gradients over all replicas."""
    if isinstance(getattr(engine, "basic_optimizer", None), LoRDO):
        raise ConfigError(
            "LoRDO: deepspeed.initialize was given a function that makes LoRDO: give it the optimizer itself, or the "
            "settings in the configuration's optimizer block"
        )


def refuse_unsupported(config: Any, model: Any, mpu: Any, mesh_device: Any = None) -> None:
    """Nothing is communicated.

    Raises:
        ConfigError: the first thing that is asked for and not supported.
    """
    for refused, what, instead in _unsupported(config, model, mpu, mesh_device):
        if refused:
            raise ConfigError(f"LoRDO: {what} is not supported in this version: {instead}")


def replica_groups_for(settings: LordoConfig, config: Any, model: Any, mpu: Any) -> ReplicaGroups:
    """The groups of the replica mesh. Collective."""
    groups = groups_of_replicas(settings.replica_size, mpu)
    _check_zero_init(model, groups, int(config.zero_config.stage))
    return groups


def groups_of_replicas(replica_size: int | str, mpu: Any) -> ReplicaGroups:
    """Cut the data-parallel ranks, those of the user's `mpu` or of a pipeline's grid, into replicas. Collective."""
    choose_device()
    if mpu is None:
        ranks, tensor_ranks = list(range(dist.get_world_size())), None
    else:
        ranks = dist.get_process_group_ranks(mpu.get_data_parallel_group())
        tensor_ranks = _tensor_ranks(mpu)
    return replica_groups(
        layout_of_replicas(ranks, replica_size, JSON_PATH + "replica_size"),
        tensor_ranks,
        bwc_pipeline_parallel_world_size(mpu),
    )


def _tensor_ranks(mpu: Any) -> list[int] | None:
    if bwc_tensor_model_parallel_world_size(mpu) == 1:
        return None
    return dist.get_process_group_ranks(bwc_tensor_model_parallel_group(mpu))


def choose_device() -> None:
    """DeepSpeed takes this rank's device a little later; objects exchanged before would all go through the first."""
    if get_accelerator().device_name() != "cpu" and "LOCAL_RANK" in os.environ:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))


def _unsupported(config: Any, model: Any, mpu: Any, mesh_device: Any) -> list[tuple[bool, str, str]]:
    """(is it asked for, what it is called, what to do instead), in DeepSpeed 0.19.8's configuration."""
    zero, fp16, bf16 = config.zero_config, config.float16_config, config.bfloat16_config
    optimizer_host, parameter_host = zero.offload_optimizer, zero.offload_param
    on_disk = OffloadDeviceEnum.nvme
    off, cpu = "switch it off", 'use "cpu"'
    mixture = any(type(module).__name__ in ("MoE", "AutoEPMoELayer") for module in model.modules())
    sharded_linear = any(hasattr(p, "ds_optim_param") for p in model.parameters())
    pipeline = isinstance(model, PipelineModule)
    stages = bwc_pipeline_parallel_world_size(mpu)
    return [
        (isinstance(model, DualPipeVModule), "a DualPipeVModule", "use a PipelineModule"),
        (isinstance(mpu, ReplicaGrid), "the PipelineModule of another LoRDO engine", "call destroy() on that engine"),
        (stages > 1 and not pipeline, f"an mpu with {stages} pipeline stages", "use a PipelineModule"),
        (_size(mpu, "context") > 1, "an mpu with context parallelism", "use a size of 1"),
        (_size(mpu, "expert_model") > 1, "an mpu with expert parallelism", "use a size of 1"),
        (
            not _covers_world(mpu),
            "an mpu whose data-, tensor- and pipeline-parallel groups do not make up all ranks",
            "use no other parallelism",
        ),
        (pipeline and zero.stage > 1, f"a PipelineModule with ZeRO stage {int(zero.stage)}", "use stage 0 or 1"),
        (mesh_device is not None, "a device mesh (Ulysses sequence parallelism)", "leave it out"),
        (mixture or config.expert_parallel_config.enabled, "DeepSpeed MoE", "use a dense model"),
        (sharded_linear, "deepspeed.linear.OptimizedLinear", "use nn.Linear"),
        (config.hybrid_engine.enabled, "hybrid_engine", off),
        (config.torch_autocast_enabled, "torch_autocast", "use bf16 or fp16"),
        (config.data_efficiency_enabled, "data_efficiency", off),
        (config.compile_config.deepcompile, "compile.deepcompile", off),
        (config.tensor_parallel_config.autotp_size > 1, "tensor_parallel.autotp_size", "leave it out"),
        (zero.zenflow is not None, "zero_optimization.zenflow", "leave it out"),
        (zero.zero_hpz_partition_size > 1, "zero_optimization.zero_hpz_partition_size", "leave it out"),
        (zero.zero_quantized_weights, "zero_optimization.zero_quantized_weights", off),
        (zero.zero_quantized_nontrainable_weights, "zero_optimization.zero_quantized_nontrainable_weights", off),
        (zero.zero_quantized_gradients, "zero_optimization.zero_quantized_gradients", off),
        (bool(optimizer_host) and optimizer_host.device == on_disk, "zero_optimization.offload_optimizer to NVMe", cpu),
        (
            bool(optimizer_host) and optimizer_host.ratio < 1,
            "zero_optimization.offload_optimizer.ratio",
            "leave it out",
        ),
        (
            bool(optimizer_host) and optimizer_host.super_offload,
            "zero_optimization.offload_optimizer.super_offload",
            off,
        ),
        (bool(parameter_host) and parameter_host.device == on_disk, "zero_optimization.offload_param to NVMe", cpu),
        (fp16.fp16_master_weights_and_grads, "fp16.fp16_master_weights_and_grads", off),
        (bf16.bf16_master_weights_and_grads, "bf16.bf16_master_weights_and_grads", off),
        (config.load_universal_checkpoint, "checkpoint.load_universal", "switch it off; it knows only Adam's moments"),
        (
            zero.elastic_checkpoint,
            "zero_optimization.elastic_checkpoint",
            "switch it off; it knows only Adam's moments",
        ),
        (zero.pipeline_loading_checkpoint, "zero_optimization.pipeline_loading_checkpoint", off),
        (config.use_node_local_storage, "checkpoint.use_node_local_storage", off),
        (config.checkpoint_config[CHECKPOINT_WRITER] is not None, "checkpoint.writer", "leave it out"),
        (config.datastates_config.enabled, "datastates_ckpt", "leave it out"),
    ]


def _size(mpu: Any, kind: str) -> int:
    """The mpu's size of a parallelism that DeepSpeed does not ask for, by megatron-core's names."""
    ask = getattr(mpu, f"get_{kind}_parallel_world_size", None)
    return 1 if ask is None else int(ask())


def _covers_world(mpu: Any) -> bool:
    if mpu is None:
        return True
    if not hasattr(mpu, "get_data_parallel_group"):
        return False
    sizes = (
        dist.get_world_size(mpu.get_data_parallel_group()),
        bwc_tensor_model_parallel_world_size(mpu),
        bwc_pipeline_parallel_world_size(mpu),
    )
    return math.prod(sizes) == dist.get_world_size()


def _check_zero_init(model: nn.Module, groups: ReplicaGroups, stage: int) -> None:
    """A model that `deepspeed.zero.Init` partitioned must be partitioned over the replica, and trained at stage 3."""
    replica = list(groups.layout.shard_group(dist.get_rank()))
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") and stage < 3:
            raise ConfigError(
                f"LoRDO: deepspeed.zero.Init partitioned {name}, but zero_optimization.stage is {stage}: use stage 3, "
                "or build the model without zero.Init"
            )
        group = getattr(parameter, "ds_process_group", None)
        ranks = replica if group is None else dist.get_process_group_ranks(group)
        if ranks != replica:
            raise ConfigError(
                f"LoRDO: deepspeed.zero.Init partitioned {name} over ranks {ranks}, but the replica is {replica}: "
                "hand it config_dict_or_path=..., or data_parallel_group=lordo_ds.zero_init_group(config)"
            )


def check_engine(engine: Any, groups: ReplicaGroups) -> None:
    """DeepSpeed must reduce gradients, and shard, over the replica and nothing else."""
    assert type(engine.basic_optimizer) is LoRDO, type(engine.basic_optimizer)
    expected = list(groups.layout.shard_group(engine.global_rank))
    asked = [engine.data_parallel_group, engine.seq_data_parallel_group, engine.mpu.get_data_parallel_group()]
    for group in [*asked, *shard_groups(engine)]:
        members = dist.get_process_group_ranks(group)
        if sorted(members) != expected or engine.dp_world_size != len(expected):
            raise RuntimeError(f"LoRDO: DeepSpeed reduces gradients over ranks {members}, the replica is {expected}")
    if is_pipeline(engine):
        check_pipeline(engine, groups)
