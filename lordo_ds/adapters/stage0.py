"""Two things that DeepSpeed 0.19.8 gets wrong at stage 0 only: fp16 loss scaling, and the norm of fp32 gradients.

ZeRO's wrappers scale the loss and unscale the gradients themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import clip_grad_norm_


def loss_scale(engine: Any) -> float | None:
    """The factor that stage 0's fp16 wrapper divides gradients by; None in other precisions and stages."""
    wrapper = engine.optimizer
    if not isinstance(wrapper, FP16_UnfusedOptimizer) or not wrapper.loss_scale_config.use_grad_scaling:
        return None
    return float(wrapper.loss_scale_config.cur_scale)


def scaled_backward(engine: Any, backward: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed scales the loss for ZeRO only, yet stage 0's fp16 wrapper unscales the gradients.

    They would be too small by the loss scale: small ones underflow, clipping never acts, eps dominates. The
    gradient that enters the loss is set to what the wrapper expects, whoever else scaled it.
    """

    @functools.wraps(backward)
    def scaled(loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        share = 1.0 / engine.gradient_accumulation_steps() if scale_wrt_gas else 1.0
        factor = share * (loss_scale(engine) or 1.0)
        loss = loss.float()
        handle = loss.register_hook(lambda gradient: torch.full_like(gradient, factor))
        try:
            return backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        finally:
            handle.remove()

    return scaled


def clip_fp32_gradients(engine: Any) -> None:
    """DeepSpeed's clipping, but the norm that it computes is kept for `get_global_grad_norm`."""
    norm = clip_grad_norm_(parameters=engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu)
    engine._global_grad_norm = float(norm)
