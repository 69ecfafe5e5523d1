"""DeepSpeed's `safe_get_*` and `safe_set_*` functions for one parameter, on an engine with LoRDO.

Weights and gradients are where they look for them. Optimizer states are not: those of a matrix live in its subspace and
have no element for each of the parameter's. DeepSpeed 0.19.8 would raise on the ranks that hold a part of the parameter
and leave the others of the shard group in an all-reduce, so the refusal comes before anything is sent.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from lordo_ds.adapters.patching import replace_method


def refuse_optimizer_states(engine: Any, version: str) -> None:
    """Let every rank refuse access to a state by name. Weights and gradients stay as they are."""
    if type(engine.optimizer) is DeepSpeedZeroOptimizer_Stage3:
        parameters = ("param", "release_swap_buffers", "optim_state_key")
        replace_method(engine.optimizer, "_get_fp32_opt_state_partition", parameters, _weights_only, version)
        return
    for parameter in engine.module.parameters():
        for name, asked in (
            ("get_full_hp_param", ("optim_state_key",)),
            ("set_full_hp_param", ("value", "optim_state_key")),
        ):
            if hasattr(parameter, name):  # ZeRO 1 and 2, and the bf16 wrapper, give it to what they train
                replace_method(parameter, name, asked, _weights_only, version)


def _weights_only(original: Any) -> Any:
    place = list(inspect.signature(original).parameters).index("optim_state_key")

    @functools.wraps(original)
    def weights_only(*args: Any, **kwargs: Any) -> Any:
        key = kwargs.get("optim_state_key", args[place] if len(args) > place else None)
        if key is not None:
            raise ValueError(
                f"LoRDO: there is no {key!r} of a parameter's shape to get or set: LoRDO's states live in the subspace "
                "of each matrix, use safe_get_full_fp32_param for weights and safe_get_full_grad for gradients"
            )
        return original(*args, **kwargs)

    return weights_only
