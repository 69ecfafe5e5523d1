"""What Megatron's own loop was started with, compared over all ranks before the first tensor travels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.utils import get_model_config
from torch import nn

from lordo_ds.config import LordoConfig
from lordo_ds.errors import ConfigError
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

# What each rank may have of its own: what it logs and times.
_MAY_DIFFER = ("timers", "log_num_zeros_in_grad", "barrier_with_L1_time", "cpu_offloading_num_layers")


def agree_on_start(
    chunks: Sequence[Any], settings: Mapping[str, Any], config: OptimizerConfig, refusal: str = ""
) -> None:
    """Refuse to start where ranks differ, or where one has a `refusal`. Collective over all ranks.

    Raises:
        ConfigError: the same one on all ranks.
    """
    if refusal:
        require_alike(Start(refusal=refusal))
    try:
        parsed = LordoConfig.parse(settings, path="")
    except ConfigError as error:
        require_alike(Start(refusal=str(error)))
        raise
    model = chunks[0]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    require_alike(
        Start(
            everywhere={
                **version_texts("megatron-core"),
                **setting_texts(parsed),
                **_config_texts("OptimizerConfig", config),
                **_config_texts("DistributedDataParallelConfig", model.ddp_config),
            },
            here={
                **_config_texts(type(get_model_config(model)).__name__, get_model_config(model)),
                **{f"parameter or buffer {i}": tensor_text(name, tensor) for i, (name, tensor) in enumerate(tensors)},
            },
            warned=machine_texts(tensors[0][1].device if tensors else None),
            place=_place(),
        )
    )


def agree_on_groups(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> None:
    """The parameter groups that Megatron made must be alike too. Collective over all ranks."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    require_alike(Start(here=parameter_texts(groups, names), place=_place()))


def _place() -> str:
    stage, index = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    return f"stage {stage}, tensor index {index}"


def _config_texts(name: str, config: Any) -> Texts:
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    values = {field.name: getattr(config, field.name, None) for field in fields if field.name not in _MAY_DIFFER}
    return flat_texts(name, values)
