"""Makes `"optimizer": {"type": "LoRDO"}` work in plain `deepspeed.initialize`.

Written against DeepSpeed 0.19.8, which has no plugin mechanism: its configuration lower-cases the optimizer
types in one list, builds an unknown one from an attribute of `torch.optim`, and admits to ZeRO the exact types in
another list. The one patch, on `DeepSpeedEngine.__init__`, hands the engine its replica as the data-parallel group
and attaches the hook once the engine stands.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.utils import groups as deepspeed_groups

from lordo_ds.adapters.engine import EngineHook, live_engines, replica_groups_for, requested_optimizer
from lordo_ds.adapters.patching import MethodPatch
from lordo_ds.adapters.replica_mpu import ReplicaMPU
from lordo_ds.config import ConfigError
from lordo_ds.optimizer import LoRDO

logger = logging.getLogger("lordo_ds")

TYPE_NAME = "lordo"
DEEPSPEED_VERSION = "DeepSpeed 0.19.8"
_ENGINE_PARAMETERS = (
    "self", "args", "model", "optimizer", "model_parameters", "training_data", "lr_scheduler", "mpu",
    "dist_init_required", "collate_fn", "config", "config_class", "mesh_device", "dont_change_device",
)  # fmt: skip
_patch: MethodPatch | None = None


def build_for_engine(params: Iterable[Any], **settings: Any) -> LoRDO:
    """What DeepSpeed calls to build the optimizer from the JSON block."""
    optimizer = LoRDO(params, **settings)
    optimizer.managed = True
    return optimizer


def register() -> None:
    """Register the optimizer type with DeepSpeed; calling it again changes nothing."""
    global _patch
    if _patch is not None:
        return
    _patch = MethodPatch(DeepSpeedEngine, "__init__", _ENGINE_PARAMETERS, _wrap_init, DEEPSPEED_VERSION)
    if TYPE_NAME not in deepspeed_config.DEEPSPEED_OPTIMIZERS:
        deepspeed_config.DEEPSPEED_OPTIMIZERS.append(TYPE_NAME)
    setattr(torch.optim, TYPE_NAME, build_for_engine)
    if LoRDO not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(LoRDO)
    if get_accelerator().device_name() == "cpu":
        # init_distributed would compile a shared-memory operator for 80 s or more that training never uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def unregister() -> None:
    """Undo `register`; engines that exist keep working."""
    global _patch
    if _patch is None:
        return
    _patch.remove()
    _patch = None
    deepspeed_config.DEEPSPEED_OPTIMIZERS.remove(TYPE_NAME)
    delattr(torch.optim, TYPE_NAME)
    zero_utils.ZERO_SUPPORTED_OPTIMIZERS.remove(LoRDO)


def _wrap_init(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: DeepSpeedEngine, args: Any, model: Any, *positional: Any, **named: Any) -> None:
        given = dict(zip(_ENGINE_PARAMETERS[3:], positional, strict=False)) | named
        settings = requested_optimizer(given.get("config_class"), given.get("optimizer"), TYPE_NAME)
        if settings is None:
            _leave_no_replica_mpu_behind(given.get("mpu"))
            original(self, args, model, **given)
            return
        groups = replica_groups_for(settings, given["config_class"], model, given.get("mpu"))
        if isinstance(given.get("optimizer"), LoRDO):
            given["optimizer"].managed = True
        training_data = given.pop("training_data", None)
        given["mpu"] = ReplicaMPU(groups)
        original(self, args, model, **given)
        EngineHook.attach(self, groups, training_data)

    return init


def _leave_no_replica_mpu_behind(mpu: Any) -> None:
    """DeepSpeed keeps the mpu in a global; an engine made after ours would reduce over one replica only."""
    if mpu is not None or not isinstance(deepspeed_groups.mpu, ReplicaMPU):
        return
    if live_engines():
        raise ConfigError(
            "LoRDO: an engine with another optimizer cannot be created while a LoRDO engine lives, because DeepSpeed "
            "keeps one data-parallel group per process: call destroy() on the LoRDO engine and drop it first"
        )
    deepspeed_groups.mpu = None
