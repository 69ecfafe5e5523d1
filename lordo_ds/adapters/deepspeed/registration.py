"""Makes `"optimizer": {"type": "LoRDO"}` work in plain `deepspeed.initialize`.

Written against DeepSpeed 0.19.8, which has no plugin mechanism: its configuration lower-cases the optimizer
types in one list, builds an unknown one from an attribute of `torch.optim`, and admits to ZeRO the exact types in
another list. The patch on `DeepSpeedEngine.__init__` hands the engine its replica as the data-parallel group
and attaches the hook once the engine stands, that on `PipelineEngine.__init__`, which calls the former, does the same
with the grid of a pipeline; those of `zero_init` keep ZeRO-3 inside the replica.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero import utils as zero_utils

from lordo_ds.adapters.deepspeed.global_mpu import left_to, lent
from lordo_ds.adapters.deepspeed.hook import DEEPSPEED_VERSION, EngineHook
from lordo_ds.adapters.deepspeed.pipeline import batch_of_replica, count_all_samples, is_pipeline, replica_grid
from lordo_ds.adapters.deepspeed.replica_mpu import ReplicaMPU
from lordo_ds.adapters.deepspeed.start import agreed_settings
from lordo_ds.adapters.deepspeed.support import refuse_hidden_optimizer, replica_groups_for
from lordo_ds.adapters.deepspeed.zero_init import zero_init_patches
from lordo_ds.adapters.patching import MethodPatch, PatchError
from lordo_ds.config import LordoConfig
from lordo_ds.optimizer import LoRDO

TYPE_NAME = "lordo"
_ENGINE_PARAMETERS = (
    "self", "args", "model", "optimizer", "model_parameters", "training_data", "lr_scheduler", "mpu",
    "dist_init_required", "collate_fn", "config", "config_class", "mesh_device", "dont_change_device",
)  # fmt: skip
_PIPELINE_PARAMETERS = ("self", "has_bool_tensors", "super_args", "super_kwargs")
_patches: list[MethodPatch] = []


def build_for_engine(params: Iterable[Any], **settings: Any) -> LoRDO:
    """What DeepSpeed calls to build the optimizer from the JSON block."""
    optimizer = LoRDO(params, **settings)
    optimizer.config = LordoConfig.parse(settings)  # messages then name the keys by their path in the block
    optimizer.managed = True
    return optimizer


def register() -> None:
    """Register the optimizer type with DeepSpeed; calling it again changes nothing."""
    if _patches:
        return
    try:
        _patches.append(MethodPatch(DeepSpeedEngine, "__init__", _ENGINE_PARAMETERS, _wrap_init, DEEPSPEED_VERSION))
        _patches.append(
            MethodPatch(PipelineEngine, "__init__", _PIPELINE_PARAMETERS, _wrap_pipeline_init, DEEPSPEED_VERSION)
        )
        for patch in zero_init_patches(TYPE_NAME, DEEPSPEED_VERSION):
            _patches.append(patch)
    except PatchError:
        _remove_patches()
        raise
    if TYPE_NAME not in deepspeed_config.DEEPSPEED_OPTIMIZERS:
        deepspeed_config.DEEPSPEED_OPTIMIZERS.append(TYPE_NAME)
    setattr(torch.optim, TYPE_NAME, build_for_engine)
    if LoRDO not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(LoRDO)
    if get_accelerator().device_name() == "cpu":
        # init_distributed would compile a shared-memory operator for 80 s or more that training never uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def unregister() -> None:
    """Undo `register`; engines that exist keep working, those of ZeRO-3 with a check over all ranks."""
    if not _patches:
        return
    _remove_patches()
    deepspeed_config.DEEPSPEED_OPTIMIZERS.remove(TYPE_NAME)
    delattr(torch.optim, TYPE_NAME)
    zero_utils.ZERO_SUPPORTED_OPTIMIZERS.remove(LoRDO)


def _remove_patches() -> None:
    while _patches:
        _patches[-1].remove()
        _patches.pop()


def _wrap_init(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: DeepSpeedEngine, args: Any, model: Any, *positional: Any, **named: Any) -> None:
        given = dict(zip(_ENGINE_PARAMETERS[3:], positional, strict=False)) | named
        config, mpu = given.get("config_class"), given.get("mpu")
        if is_pipeline(self):  # called by its own constructor, which is patched too
            original(self, args, model, **given)
            return
        settings = agreed_settings(config, given, model, mpu, TYPE_NAME)
        if settings is None:
            original(self, args, model, **given)
            refuse_hidden_optimizer(self)
            return
        groups = replica_groups_for(settings, config, model, mpu)
        _adopt_client_optimizer(given)
        training_data, user_config = given.pop("training_data", None), given.get("config")
        given["mpu"] = ReplicaMPU(groups, mpu)
        if isinstance(user_config, dict):
            given["config"] = _for_one_replica(user_config, config, groups.layout.replica_size)
        with lent(given["mpu"]):
            original(self, args, model, **given)
            self.config = user_config
            EngineHook.attach(self, groups, training_data)
        left_to(mpu)

    return init


def _wrap_pipeline_init(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: PipelineEngine, has_bool_tensors: bool = False, *positional: Any, **named: Any) -> None:
        given = dict(zip(_ENGINE_PARAMETERS[1:], positional, strict=False)) | named
        config, grid = given.get("config_class"), given.get("mpu")
        settings = agreed_settings(config, given, given["model"], grid, TYPE_NAME)
        if settings is None:
            original(self, has_bool_tensors, **given)
            refuse_hidden_optimizer(self)
            return
        groups = replica_groups_for(settings, config, given["model"], grid)
        _adopt_client_optimizer(given)
        training_data = given.pop("training_data", None)
        with replica_grid(given, groups), lent(given["mpu"]):
            with batch_of_replica(config, groups):
                original(self, has_bool_tensors, **given)
            count_all_samples(self)
            # Only now: the constructor of the base class returns before the pipeline stands.
            EngineHook.attach(self, groups, training_data)
        left_to(grid)

    return init


def _adopt_client_optimizer(given: dict[str, Any]) -> None:
    """An optimizer that the user built waits for the engine's hook, like the one built from the JSON block."""
    if isinstance(given.get("optimizer"), LoRDO):
        given["optimizer"].managed = True
        # DeepSpeed wants its own for offloading; LoRDO steps on the host too.
        given["config_class"].zero_force_ds_cpu_optimizer = False


def _for_one_replica(user_config: dict[str, Any], resolved: Any, replica_size: int) -> dict[str, Any]:
    """ZeRO-3 reads the configuration once more, on the mpu's data-parallel size, and checks the batch keys."""
    micro, accumulation = resolved.train_micro_batch_size_per_gpu, resolved.gradient_accumulation_steps
    return {
        **user_config,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * replica_size,
    }
