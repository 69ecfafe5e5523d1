"""What DeepSpeed was started with, compared over all ranks before the replicas' groups are built."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config_utils import DeepSpeedConfigObject
from deepspeed.utils.bwc import (
    bwc_pipeline_parallel_world_size,
    bwc_tensor_model_parallel_rank,
    bwc_tensor_model_parallel_world_size,
)
from torch import nn

from lordo_ds.adapters.deepspeed.support import asks_for_lordo, choose_device, refuse_unsupported, requested_settings
from lordo_ds.config import LordoConfig
from lordo_ds.errors import ConfigError
from lordo_ds.optimizer import LoRDO
from lordo_ds.sync.alike import (
    Start,
    Texts,
    flat_texts,
    machine_texts,
    parameter_texts,
    require_alike,
    setting_texts,
    tensor_text,
    version_texts,
)

# Of DeepSpeed 0.19.8's resolved configuration, what each rank may have of its own: what it shows, times and logs.
_MAY_DIFFER = (
    "steps_per_print", "dump_state", "disable_python_gc", "comms_config", "monitor_config", "flops_profiler_config",
    "wall_clock_breakdown", "memory_breakdown", "autotuning_config", "timers_config", "log_level", "aio_config",
)  # fmt: skip
# Not settings, or the same ones again: LoRDO's own are compared as they are resolved.
_LEFT_OUT = (
    "_param_dict", "global_rank", "optimizer_name", "optimizer_params", "zero_enabled", "zero_optimization_stage",
)  # fmt: skip
_NAMES = {"zero": "zero_optimization", "float16": "fp16", "bfloat16": "bf16"}


def agreed_settings(
    config: Any, given: dict[str, Any], model: nn.Module, mpu: Any, type_name: str
) -> LordoConfig | None:
    """LoRDO's settings, after all ranks were found to be started alike; None for another optimizer. Collective then.

    Args:
        config: DeepSpeed's, resolved.
        given: the arguments of the engine; a generator of parameters in it becomes a list.

    Raises:
        ConfigError: the same one on all ranks: a difference, or what one of them cannot do.
    """
    client = given.get("optimizer")
    if not asks_for_lordo(config, client, type_name):
        return None
    if given.get("model_parameters") is not None:
        given["model_parameters"] = list(given["model_parameters"])
    settings, refusal = None, ""
    try:
        settings = requested_settings(config, client)
        refuse_unsupported(config, model, mpu, given.get("mesh_device"))
    except ConfigError as error:
        refusal = str(error)
    choose_device()
    require_alike(
        Start(refusal=refusal) if settings is None or refusal else _start(settings, config, given, model, mpu)
    )
    return settings


def _start(settings: LordoConfig, config: Any, given: dict[str, Any], model: nn.Module, mpu: Any) -> Start:
    stages, tensor_size = bwc_pipeline_parallel_world_size(mpu), bwc_tensor_model_parallel_world_size(mpu)
    stage = model._grid.get_stage_id() if isinstance(model, PipelineModule) else 0
    mesh = {"the mesh": f"{stages} pipeline stages x {tensor_size} tensor-parallel ranks"}
    return Start(
        everywhere={
            **version_texts("deepspeed"),
            **setting_texts(settings),
            **configuration_texts(config),
            **_scheduler_texts(given.get("lr_scheduler")),
            **mesh,
        },
        here=_model_texts(model, given),
        warned=machine_texts(torch.device(get_accelerator().current_device_name())),
        place=f"stage {stage}, tensor index {bwc_tensor_model_parallel_rank(mpu) if tensor_size > 1 else 0}",
    )


def configuration_texts(config: Any) -> Texts:
    """What matters of DeepSpeed's configuration, as it is resolved."""
    found: Texts = {}
    for attribute, value in vars(config).items():
        if attribute not in _MAY_DIFFER and attribute not in _LEFT_OUT:
            key = attribute.removesuffix("_config")
            key = _NAMES.get(key, key).replace("scheduler_", "scheduler.")
            found |= flat_texts(key, vars(value) if isinstance(value, DeepSpeedConfigObject) else value)
    return found


def _scheduler_texts(scheduler: Any) -> Texts:
    """Of one that the user made; the plain values of its state tell its settings."""
    if scheduler is None:
        return {}
    found = flat_texts("the lr_scheduler given to deepspeed.initialize", scheduler)
    if hasattr(scheduler, "state_dict") and not isinstance(scheduler, type):
        found |= flat_texts("lr_scheduler", scheduler.state_dict())
    return found


def _model_texts(model: nn.Module, given: dict[str, Any]) -> Texts:
    client, listed = given.get("optimizer"), given.get("model_parameters")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if isinstance(client, LoRDO):
        groups = client.param_groups
    elif listed and isinstance(listed[0], dict):
        listed[:] = [{**group, "params": _as_list(group["params"])} for group in listed]
        groups = listed
    else:
        groups = [{"params": list(model.parameters()) if listed is None else listed}]
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    found = parameter_texts(groups, names)
    others = [(name, p) for name, p in model.named_parameters() if id(p) not in grouped]
    for place, (name, tensor) in enumerate([*others, *model.named_buffers()]):
        found[f"untrained tensor {place}"] = tensor_text(name, tensor)
    return found


def _as_list(parameters: Any) -> list[Any]:
    """torch takes a single parameter, or an iterable that can be read once only."""
    return [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
