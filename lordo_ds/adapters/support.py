"""What LoRDO runs with: refusals before an engine is built, checks of the one that was built.

Training with gradients reduced over all replicas, or over none, is the worst outcome; so everything that is not known
to work is refused, in one line that names what to do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.model_checkpointing.constants import CHECKPOINT_WRITER
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size, bwc_tensor_model_parallel_world_size
from torch import nn

from lordo_ds.adapters.zero import shard_groups
from lordo_ds.config import ConfigError, LordoConfig
from lordo_ds.core.mesh import replica_layout
from lordo_ds.dist.groups import ReplicaGroups, replica_groups
from lordo_ds.optimizer import LoRDO


def requested_optimizer(config: Any, client_optimizer: Any, type_name: str) -> LordoConfig | None:
    """The LoRDO settings an engine is being built with, or None if it is built with another optimizer."""
    if isinstance(client_optimizer, LoRDO):
        return client_optimizer.config
    if client_optimizer is None and str(config.optimizer_name).lower() == type_name:
        return LordoConfig.parse(config.optimizer_params or {})
    return None


def replica_groups_for(
    settings: LordoConfig, config: Any, model: Any, mpu: Any, mesh_device: Any = None
) -> ReplicaGroups:
    """Refuse what is not supported, then build the groups of the replica mesh. Collective."""
    for refused, what, instead in _unsupported(config, model, mpu, mesh_device):
        if refused:
            raise ConfigError(f"LoRDO: {what} is not supported in this version: {instead}")
    groups = groups_of_replicas(settings.replica_size, mpu)
    _check_zero_init(model, groups)
    return groups


def groups_of_replicas(replica_size: int | str, mpu: Any) -> ReplicaGroups:
    """Cut the data-parallel ranks, those of the user's `mpu` if there is one, into replicas. Collective."""
    if mpu is None:
        ranks: Sequence[int] = range(dist.get_world_size())
    else:
        ranks = dist.get_process_group_ranks(mpu.get_data_parallel_group())
    per_node = _ranks_per_node() if replica_size == "node" else len(ranks)
    return replica_groups(replica_layout(ranks, replica_size, per_node))


def _ranks_per_node() -> int:
    """Ranks on every node; refused unless each has equally many, numbered one after the other. Collective."""
    world, me = dist.get_world_size(), dist.get_rank()
    stated = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    local_rank = int(os.environ.get("LOCAL_RANK", me))
    size = int(stated) if stated is not None else (1 if world == 1 else 0)
    device = get_accelerator().device_name(local_rank)
    rows = [torch.empty(2, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(rows, torch.tensor([size, me - local_rank], dtype=torch.int64, device=device))
    sizes, first_ranks = torch.stack(rows).T.tolist()
    if 0 in sizes:
        raise ConfigError(
            'LoRDO: optimizer.params.replica_size = "node" needs LOCAL_WORLD_SIZE, which torchrun and the deepspeed '
            "launcher set: set it to the number of ranks on each node"
        )
    if len(set(sizes)) > 1 or any(first != rank // size * size for rank, first in enumerate(first_ranks)):
        raise ConfigError(
            'LoRDO: optimizer.params.replica_size = "node" needs equally many consecutive ranks on every node, found '
            f"{sizes}: give a number that divides {world}"
        )
    return size


def _unsupported(config: Any, model: Any, mpu: Any, mesh_device: Any) -> list[tuple[bool, str, str]]:
    """(is it asked for, what it is called, what to do instead), in DeepSpeed 0.19.8's configuration."""
    zero, fp16, bf16 = config.zero_config, config.float16_config, config.bfloat16_config
    optimizer_host, parameter_host = zero.offload_optimizer, zero.offload_param
    on_disk = OffloadDeviceEnum.nvme
    off, cpu = "switch it off", 'use "cpu"'
    mixture = any(type(module).__name__ in ("MoE", "AutoEPMoELayer") for module in model.modules())
    sharded_linear = any(hasattr(p, "ds_optim_param") for p in model.parameters())
    parallel = _model_parallel_size(mpu)
    return [
        (isinstance(model, PipelineModule), "a PipelineModule", "pass a plain module"),
        (parallel > 1, f"an mpu with {parallel} tensor- and pipeline-parallel ranks", "use sizes of 1"),
        (
            not _covers_world(mpu, parallel),
            "an mpu whose data-parallel group is not all ranks",
            "use data parallelism only",
        ),
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


def _model_parallel_size(mpu: Any) -> int:
    if mpu is None or not hasattr(mpu, "get_data_parallel_group"):
        return 1
    return int(bwc_tensor_model_parallel_world_size(mpu) * bwc_pipeline_parallel_world_size(mpu))


def _covers_world(mpu: Any, model_parallel_size: int) -> bool:
    if mpu is None or model_parallel_size > 1:
        return True
    if not hasattr(mpu, "get_data_parallel_group"):
        return False
    return dist.get_world_size(mpu.get_data_parallel_group()) == dist.get_world_size()


def _check_zero_init(model: nn.Module, groups: ReplicaGroups) -> None:
    """A model that `deepspeed.zero.Init` partitioned must be partitioned over the replica."""
    replica = list(groups.layout.shard_group(dist.get_rank()))
    for name, parameter in model.named_parameters():
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
    for group in [engine.data_parallel_group, engine.seq_data_parallel_group, *shard_groups(engine)]:
        members = dist.get_process_group_ranks(group)
        if sorted(members) != expected or engine.dp_world_size != len(expected):
            raise RuntimeError(f"LoRDO: DeepSpeed reduces gradients over ranks {members}, the replica is {expected}")
