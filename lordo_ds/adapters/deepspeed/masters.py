"""The weights that DeepSpeed's wrappers step, and the model's copy of them: which follows which, and when.

Written against DeepSpeed 0.19.8. Where they lie, `wrappers` beside it tells.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from lordo_ds.adapters.patching import replace_method
from lordo_ds.optimizer import LoRDO


@torch.no_grad()
def refresh_low_precision(engine: Any) -> None:
    """Give the model the weights that the stepped tensors hold. Collective inside the replica."""
    wrapper = engine.optimizer
    if type(wrapper) is FP16_UnfusedOptimizer:
        for masters, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.data.copy_(master.data)
    elif type(wrapper) is DeepSpeedZeroOptimizer_Stage3:
        wrapper.checkpoint_event_prologue()  # partitions every parameter, as DeepSpeed does before its own step
        for i in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(i)
        wrapper.checkpoint_event_epilogue()  # gathers the persistent ones again, if they were
    elif type(wrapper) is not LoRDO:
        wrapper.update_lp_params()


def take_masters_from_model(engine: Any) -> None:
    """Give stage 0's masters the model's weights; DeepSpeed 0.19.8 forgets it when it loads weights only."""
    if type(engine.optimizer) in (FP16_UnfusedOptimizer, BF16_Optimizer):
        engine.optimizer.refresh_fp32_params()


def gather_again_what_was_gathered(engine: Any, version: str) -> None:
    """Around a refresh, a save or a load, ZeRO-3 gathers its persistent parameters only if they were gathered before.

    Before the first forward pass none is, and DeepSpeed 0.19.8 learns by that which modules use weights of others:
    what it finds gathered then is traced wrongly, and missing in the backward pass or the second step.
    """
    wrapper = engine.optimizer
    if type(wrapper) is not DeepSpeedZeroOptimizer_Stage3:
        return
    gathered = True

    def noting(prologue: Any) -> Any:
        @functools.wraps(prologue)
        def checkpoint_event_prologue() -> None:
            nonlocal gathered
            gathered = any(p.ds_status == ZeroParamStatus.AVAILABLE for p in wrapper.persistent_parameters)
            prologue()

        return checkpoint_event_prologue

    def as_before(epilogue: Any) -> Any:
        @functools.wraps(epilogue)
        def checkpoint_event_epilogue() -> None:
            if gathered:
                epilogue()

        return checkpoint_event_epilogue

    replace_method(wrapper, "checkpoint_event_prologue", (), noting, version)
    replace_method(wrapper, "checkpoint_event_epilogue", (), as_before, version)
