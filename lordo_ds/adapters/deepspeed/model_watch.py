"""The model's own weights, which users write to, beside those that DeepSpeed's wrappers step.

A wrapper with masters (ZeRO, bf16, fp16) gives the model the masters' values after every step: what a user has loaded
into the model meanwhile would be lost without a word. Written against DeepSpeed 0.19.8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from lordo_ds.adapters.deepspeed.wrappers import held_intervals
from lordo_ds.comm.inside import InsideComm
from lordo_ds.core.fragments import Interval
from lordo_ds.core.grouping import ParameterFacts
from lordo_ds.optimizer import LoRDO
from lordo_ds.replica.model_copy import ModelCopy, checked_model, unresized, whole_copy
from lordo_ds.replica.outside_changes import OutsideChanges


def watch_engine(engine: Any, outside: OutsideChanges, facts: Mapping[nn.Parameter, ParameterFacts]) -> None:
    """Have changes of the model's weights seen, and taken over by what is stepped."""
    wrapper, held = engine.optimizer, held_intervals(engine)
    parameters = {facts[parameter].name: parameter for parameter in held}
    copies = {}
    if type(wrapper) is DeepSpeedZeroOptimizer_Stage3:
        copies = {name: _partition(parameter, held[parameter]) for name, parameter in parameters.items()}
        same_on: InsideComm | None = InsideComm()  # every shard has its own part
    elif type(wrapper) is FP16_UnfusedOptimizer:
        copies = {name: whole_copy(parameter, held[parameter]) for name, parameter in parameters.items()}
        same_on = None
    elif type(wrapper) is not LoRDO:
        copies = {name: whole_copy(parameter, held[parameter]) for name, parameter in parameters.items()}
        same_on = outside.inside.shard
    else:
        same_on = None
    in_buffers = bool(copies) and type(wrapper) not in (DeepSpeedZeroOptimizer_Stage3, FP16_UnfusedOptimizer)
    outside.watch(copies, checked_model(engine.module, parameters, in_buffers), same_on)


def unresized_before(engine: Any) -> Callable[[Any], Any]:
    """Makes the engine's forward pass refuse resized parameters; autograd would, at ZeRO's hooks, without a name."""
    trained = held_intervals(engine)
    check = unresized({name: parameter for name, parameter in engine.module.named_parameters() if parameter in trained})

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def forward(*inputs: Any, **kwargs: Any) -> Any:
            check()
            return original(*inputs, **kwargs)

        return forward

    return make


def _partition(parameter: Any, held: Interval) -> ModelCopy:
    """Stage 3: this rank's part; out of the gathered parameter where there is one, because users write to that."""

    def part() -> Tensor:
        start, stop = held
        gathered: Tensor = parameter.detach()
        if gathered.numel() == parameter.ds_numel:
            return gathered.reshape(-1)[start:stop]
        partition: Tensor = parameter.ds_tensor.detach()
        return partition.view(-1)[: stop - start]

    # Gathering moves the storage at every step, and leaves the version as it is.
    return ModelCopy(whole=part, held=part, token=lambda: (parameter._version, parameter.ds_tensor._version))
