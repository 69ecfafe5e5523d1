"""What DeepSpeed 0.19.8 gets wrong at stage 0: fp16 loss scaling, and the norm of gradients on a model-parallel mesh.

ZeRO's wrappers scale the loss and unscale the gradients themselves, and count every parameter once.

The norm: fp32 clipping counts parameters that are not tensor-parallel on the first pipeline stage only; the
half-precision wrapper looks for the marks of parameters on gradients, which have none, and so counts tied copies twice
and nothing on tensor ranks above 0. Here every parameter of a replica is counted once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor, nn

from lordo_ds.adapters.patching import replace_method


def own_norm(engine: Any, tensor: dist.ProcessGroup, holders: dist.ProcessGroup, version: str, copies: int = 1) -> None:
    """Let this engine clip, and skip steps, by the norm over the whole model.

    Args:
        tensor: the tensor-parallel ranks.
        holders: ranks that hold the whole model, `copies` times over, with equal gradients.
    """
    norm = functools.partial(gradient_norm, tensor=tensor, holders=holders, copies=copies, device=engine.device)
    engine.clip_fp32_gradients = functools.partial(_clip_fp32_gradients, engine, norm)
    wrapper = engine.optimizer
    if type(wrapper) is FP16_UnfusedOptimizer:
        make = functools.partial(_half_precision_step, wrapper, norm)
        replace_method(wrapper, "step", ("closure",), make, version)
    elif type(wrapper) is BF16_Optimizer:
        make = functools.partial(_never_empty, engine.device)
        replace_method(wrapper, "get_grads_for_norm", ("for_clipping",), make, version)


def gradient_norm(
    parameters: Iterable[nn.Parameter],
    tensor: dist.ProcessGroup,
    holders: dist.ProcessGroup,
    copies: int,
    device: torch.device,
) -> Tensor:
    """2-norm of the gradients of a model, float32; equal on all holders. Collective over them; see `own_norm`.

    Slices of tensor-parallel parameters count on every tensor rank, the others on the first; copies that later
    pipeline stages hold of tied weights do not count.
    """
    first = dist.get_rank(tensor) == 0
    norms = [
        torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        for parameter in parameters
        if parameter.grad is not None
        and (first or is_model_parallel_parameter(parameter))
        and not getattr(parameter, PIPE_REPLICATED, False)
    ]
    squares = torch.zeros(1, dtype=torch.float64, device=device)
    if norms:
        squares += torch.stack(norms).double().square().sum()
    if dist.get_world_size(holders) > 1:
        dist.all_reduce(squares, group=holders)
        squares /= copies
    return squares.sqrt().float().squeeze(0)


@torch.no_grad()
def _clip_fp32_gradients(engine: Any, norm_of: Callable[..., Tensor]) -> None:
    """DeepSpeed's clipping by our norm, which is kept for `get_global_grad_norm`."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = norm_of(engine.module.parameters())
    engine._global_grad_norm = float(norm)
    factor = torch.clamp(engine.gradient_clipping() / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)


def _half_precision_step(wrapper: FP16_UnfusedOptimizer, norm_of: Callable[..., Tensor], original: Any) -> Any:
    """The wrapper's step with our norm, and one decision for the whole replica whether to skip it.

    Two more differences: gradients are unscaled by the scale that they were computed with (DeepSpeed updates it
    first, which halves the gradient whenever the scale grows), and the norm that is reported is unscaled.
    """
    pairs = [
        (low, master)
        for lows, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        for low, master in zip(lows, masters, strict=True)
    ]

    @functools.wraps(original)
    @torch.no_grad()
    def step(closure: Any = None) -> bool:
        norm = norm_of(low for low, _ in pairs)
        wrapper.overflow = not bool(torch.isfinite(norm))
        if wrapper.overflow:
            return bool(wrapper._skip_invalid_grad_norm())
        for low, master in pairs:
            master.grad = torch.zeros_like(master) if low.grad is None else low.grad.to(master.dtype)
        wrapper.unscale_and_clip_grads(norm)
        wrapper._global_grad_norm = float(norm) / wrapper.loss_scale_config.cur_scale
        wrapper._update_scale(False)
        wrapper.optimizer.step()
        for low, master in pairs:
            master.grad = None
            low.data.copy_(master.data)
        return False

    return step


def _never_empty(device: torch.device, original: Any) -> Any:
    """DeepSpeed cannot stack the norms of a stage, or tensor rank, that has nothing to count: give it a zero."""

    @functools.wraps(original)
    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        found = original(for_clipping)
        if for_clipping or found[0]:
            return found
        return [torch.zeros(1, device=device)], found[1]

    return get_grads_for_norm


# -- fp16 loss scaling -------------------------------------------------------------------------------


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
