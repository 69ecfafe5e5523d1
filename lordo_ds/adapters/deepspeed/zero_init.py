"""ZeRO-3 on replicas: `deepspeed.zero.Init`, its group and dtype, and where DeepSpeed 0.19.8 assumes the world.

`zero.Init` partitions a model while it is being built, before there is an engine, over all ranks unless it is told
otherwise. Inside its context `Module.apply` broadcasts from global rank 0, which is not in every replica; and the check
that all ranks run the same modules broadcasts over all ranks, so that replicas would wait for each other.

Its `dtype` is ignored on devices without fp16: `dtype or float16 if supported else bfloat16` is read as
`(dtype or float16) if supported else bfloat16`, and a model asked for in fp32 is built in bf16.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed.comm as deepspeed_comm
import torch
import torch.distributed as dist
from deepspeed import load_ds_config
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.partition_parameters import Init, InsertPostInitMethodToModuleSubClasses
from deepspeed.runtime.zero.utils import is_zero_param
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from lordo_ds.adapters.deepspeed.replica_mpu import ReplicaMPU
from lordo_ds.adapters.deepspeed.support import choose_device, groups_of_replicas
from lordo_ds.adapters.patching import MethodPatch
from lordo_ds.sync.alike import Start, require_alike

_INIT_PARAMETERS = ("self", "module", "data_parallel_group", "mem_efficient_linear", "remote_device", "pin_memory",
                    "config_dict_or_path", "config", "enabled", "dtype", "mpu")  # fmt: skip


def zero_init_group(config: dict[str, Any] | str, mpu: Any = None) -> dist.ProcessGroup:
    """The group to give `deepspeed.zero.Init(data_parallel_group=...)`: the ranks of this replica. Collective.

    `zero.Init` asks for it by itself where its `config_dict_or_path` names LoRDO.

    Args:
        config: the DeepSpeed configuration, or its path; only `optimizer.params.replica_size` is read.
        mpu: the one that `deepspeed.initialize` will get, if any.
    """
    if not deepspeed_comm.is_initialized():
        deepspeed_comm.init_distributed(get_accelerator().communication_backend_name())
    block = config if isinstance(config, dict) else load_ds_config(config)
    params = (block.get("optimizer") or {}).get("params") or {}
    size = params.get("replica_size", 1)
    choose_device()
    require_alike(Start({"optimizer.params.replica_size": repr(size)}))  # all else is compared with the engine
    return groups_of_replicas(size, mpu).shard


def zero_init_patches(type_name: str, version: str) -> Iterator[MethodPatch]:
    """Apply the patches of this module, one after the other."""
    give_group = functools.partial(_give_replica_group, type_name=type_name)
    yield MethodPatch(Init, "__init__", _INIT_PARAMETERS, give_group, version)
    yield MethodPatch(
        InsertPostInitMethodToModuleSubClasses, "_set_dtype", ("self", "ds_config", "dtype"), _obey_dtype, version
    )
    yield MethodPatch(Init, "patch_init_and_builtins", ("self",), _apply_inside_group, version)
    yield MethodPatch(zero_utils, "assert_lst_len_same_as_other_ranks", ("args", "kwargs"), _length_in_replica, version)
    yield MethodPatch(zero_utils, "get_lst_from_rank0", ("lst",), _values_in_replica, version)


# -- zero.Init ---------------------------------------------------------------------------------------


def _give_replica_group(original: Any, type_name: str) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Init, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        config = given.get("config_dict_or_path", given.get("config"))
        own_group = given.get("data_parallel_group", given.get("sequence_data_parallel_group"))
        if config is not None and own_group is None and given.get("enabled", True):
            block = config if isinstance(config, dict) else load_ds_config(config)
            if str((block.get("optimizer") or {}).get("type")).lower() == type_name:
                given["data_parallel_group"] = zero_init_group(block, given.get("mpu"))
        original(**given)

    return init


def _obey_dtype(original: Any) -> Any:
    @functools.wraps(original)
    def _set_dtype(self: Init, ds_config: Any, dtype: torch.dtype | None) -> None:
        original(self, ds_config, dtype)
        if dtype is not None:
            self.dtype = dtype

    return _set_dtype


def _apply_inside_group(original: Any) -> Any:
    @functools.wraps(original)
    def patch_init_and_builtins(self: Init) -> None:
        original(self)
        if Init.override_module_apply and self.ds_process_group != deepspeed_comm.get_world_group():
            patched: Any = nn.Module  # DeepSpeed keeps the original in `_old_apply`, which leaving the context restores
            patched.apply = _gathered_apply(patched._old_apply)

    return patch_init_and_builtins


def _gathered_apply(original: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed's own `Module.apply` for partitioned modules, but the source of the broadcast is in the group."""

    def on_gathered(fn: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
        if hasattr(fn, "wrapped"):
            return fn

        @functools.wraps(fn)
        def applied(module: nn.Module) -> None:
            parameters = sorted(filter(is_zero_param, module.parameters(recurse=False)), key=lambda p: p.ds_id)
            for parameter in parameters:
                parameter.all_gather()
            fn(module)
            for parameter in parameters:
                source = dist.get_global_rank(parameter.ds_process_group, 0)
                dist.broadcast(parameter.data, source, group=parameter.ds_process_group)
            for parameter in parameters:
                parameter.partition(has_been_updated=True)

        applied.wrapped = True  # type: ignore[attr-defined]
        return applied

    @functools.wraps(original)
    def apply(module: nn.Module, fn: Callable[[nn.Module], Any]) -> Any:
        return original(module, on_gathered(fn))

    return apply


# -- the check that all ranks of a ZeRO-3 group run the same modules ---------------------------------


def _replica_group() -> dist.ProcessGroup | None:
    mpu = deepspeed_groups.mpu
    return mpu.groups.shard if isinstance(mpu, ReplicaMPU) else None


def _of_first_rank(values: list[int], group: dist.ProcessGroup) -> list[int]:
    device = get_accelerator().device_name(int(os.environ["LOCAL_RANK"]))
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
    return [int(value) for value in tensor.tolist()]


def _length_in_replica(original: Any) -> Any:
    def assert_lst_len_same_as_other_ranks(lst: list[int]) -> None:
        group = _replica_group()
        if group is None:
            original(lst)
            return
        (length,) = _of_first_rank([len(lst)], group)
        if length != len(lst):
            raise RuntimeError(
                f"rank {dist.get_rank()} ran {len(lst)} modules or parameters under ZeRO-3, the first rank of its "
                f"replica {length}: all ranks of a replica must run the same ones"
            )

    return assert_lst_len_same_as_other_ranks


def _values_in_replica(original: Any) -> Any:
    def get_lst_from_rank0(lst: list[int]) -> list[int]:
        group = _replica_group()
        return list(original(lst)) if group is None else _of_first_rank(lst, group)

    return get_lst_from_rank0
