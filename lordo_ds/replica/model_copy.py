"""The model's own weights where other tensors are stepped, and what a model must not lose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lordo_ds.core.fragments import Interval
from lordo_ds.errors import ConfigError


@dataclass(frozen=True)
class ModelCopy:
    """The model's own tensor of a parameter, where the stepped one is another: a master, or a shard of it.

    `whole` is all that this rank holds of it, `held` the elements that it steps, both flat. `token` is the same object
    value as long as nobody has written to it openly; it costs no host sync.
    """

    whole: Callable[[], Tensor]
    held: Callable[[], Tensor]
    token: Callable[[], object]


def checked_model(module: nn.Module, parameters: Mapping[str, Any], in_buffers: bool = False) -> Callable[[bool], None]:
    """Refuses a model in which another object has taken the place of a parameter that is stepped.

    Args:
        in_buffers: the wrapper keeps them in flat buffers and writes there: other storage would never change again.
    """
    check_shapes = unresized(parameters)
    storage = {name: parameter.data_ptr() for name, parameter in parameters.items() if in_buffers}

    def check(all_of_it: bool) -> None:
        check_shapes()
        for name, parameter in parameters.items():
            if in_buffers and parameter.data_ptr() != storage[name]:
                raise ConfigError(
                    f"LoRDO: {name} was given other storage (parameter.data = ...), which DeepSpeed does not step: "
                    "write into it (parameter.data.copy_(...)), or change the model before deepspeed.initialize"
                )
        if all_of_it:  # walks through every module: not at every step
            present = set(module.parameters())
            gone = [name for name, parameter in parameters.items() if parameter not in present]
            if gone:
                raise ConfigError(
                    f"LoRDO: {gone[0]} was replaced by another parameter after its training was set up, and the "
                    "optimizer steps the old one: resize or replace it before deepspeed.initialize"
                )

    return check


def unresized(parameters: Mapping[str, Any]) -> Callable[[], None]:
    """Refuses parameters of another shape than they have now."""
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in parameters.items()}

    def check() -> None:
        for name, parameter in parameters.items():
            now = getattr(parameter, "ds_shape", parameter.shape)
            if now != shapes[name]:
                raise ConfigError(
                    f"LoRDO: {name} was resized from {tuple(shapes[name])} to {tuple(now)} after its training was set "
                    "up, and the optimizer steps the old one: resize the model before deepspeed.initialize"
                )

    return check


def whole_copy(parameter: nn.Parameter, held: Interval) -> ModelCopy:
    """Of a parameter that this rank has whole."""
    return ModelCopy(
        whole=lambda: parameter.detach().reshape(-1),
        held=lambda: parameter.detach().reshape(-1)[slice(*held)],
        token=lambda: (parameter._version, parameter.data_ptr()),
    )
