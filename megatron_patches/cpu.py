"""Run megatron-core where there is no CUDA.

Megatron asks `torch.cuda` for its device and random state, and makes its masks there, even when every tensor
is on the CPU. `install()` answers in CUDA's place: the device is the CPU, and the CPU generator is the one
generator. It does nothing where CUDA is available and checks every function against the signature it was
written for; `uninstall()` puts everything back.

Covered: building and training models with local (not TransformerEngine) layers, dropout, activation
recomputation, tensor and pipeline process groups. Not covered: Megatron's own pipeline schedules and its
broadcast of batches, which hard-code device="cuda".
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_patches.versions import MegatronMismatchError, require_parameters, require_supported_version


def _current_device() -> torch.device:
    return torch.device("cpu")


def _synchronize(device: Any = None) -> None:
    return None


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def _cuda_rng_state(device: Any = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _causal_mask(sq: int) -> torch.Tensor:
    """(sq, sq) bool, True where attention is forbidden: above the diagonal."""
    return torch.ones(sq, sq, dtype=torch.bool).triu(diagonal=1)


def _sliding_window_causal_mask(sq: int, skv: int, window_size: tuple[int, int]) -> torch.Tensor:
    """(sq, skv) bool, True where a key is outside the query's window (keys before it, keys after it)."""
    query = torch.arange(sq)[:, None] + (skv - sq)
    key = torch.arange(skv)[None, :]
    return (key < query - window_size[0]) | (key > query + window_size[1])


class _CudaIsTheCpu(TorchFunctionMode):
    """device="cuda" and `.cuda()` mean the CPU, and a tensor's type is called what it would be called on a GPU.

    It costs a Python call per torch function, so it is on inside a few of Megatron's functions only.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs:
            kwargs["device"] = _never_cuda(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(_never_cuda(arg) for arg in args)
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _never_cuda(device: Any) -> Any:
    if isinstance(device, str | torch.device) and str(device).split(":")[0] == "cuda":
        return torch.device("cpu")
    return device


def _under_the_mode(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with _CudaIsTheCpu():
            return original(*args, **kwargs)

    return on_cpu


@dataclass(frozen=True)
class _Patch:
    """`owner` is a module, or a module and a class as "module:class"; `make` is original -> replacement.

    `parameters` are the names of the function's parameters, or of the first ones where they end in "...".
    """

    owner: str
    name: str
    parameters: tuple[str, ...]
    make: Callable[[Callable[..., Any]], Callable[..., Any]]

    def find_owner(self) -> Any:
        module, _, cls = self.owner.partition(":")
        found = importlib.import_module(module)
        return getattr(found, cls) if cls else found


def _instead(owner: str, name: str, parameters: tuple[str, ...], replacement: Callable[..., Any]) -> _Patch:
    return _Patch(owner, name, parameters, lambda original: replacement)


def _on_cpu(owner: str, name: str, *parameters: str) -> _Patch:
    return _Patch(owner, name, parameters, _under_the_mode)


_RANDOM = "megatron.core.tensor_parallel.random"
_UTILS = "megatron.core.transformer.utils"
_SOFTMAX = "megatron.core.fusions.fused_softmax"  # imports the masks by name
_OPTIMIZER = "megatron.core.optimizer.optimizer"  # imports the functions on gradients by name
_SCALER = "megatron.core.optimizer.grad_scaler"
_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_SCHEDULE = ("forward_step_func", "data_iterator", "model", "num_microbatches", "seq_length", "micro_batch_size", "...")
_LANGUAGE = "megatron.core.models.common.language_module.language_module:LanguageModule"

_PATCHES = (
    _instead("torch.cuda", "current_device", (), _current_device),
    _instead("torch.cuda", "synchronize", ("device",), _synchronize),
    _instead("torch.cuda", "manual_seed", ("seed",), _manual_seed),
    _instead("torch.cuda", "get_rng_state", ("device",), _cuda_rng_state),
    _instead(_RANDOM, "_get_cuda_rng_state", ("device", "clone", "graph_safe"), _get_rng_state),
    _instead(_RANDOM, "_set_cuda_rng_state", ("new_state", "device", "graph_safe"), _set_rng_state),
    _instead(_UTILS, "get_default_causal_mask", ("sq",), _causal_mask),
    _instead(_SOFTMAX, "get_default_causal_mask", ("sq",), _causal_mask),
    _instead(_UTILS, "get_sliding_window_causal_mask", ("sq", "skv", "window_size"), _sliding_window_causal_mask),
    _instead(_SOFTMAX, "get_sliding_window_causal_mask", ("sq", "skv", "window_size"), _sliding_window_causal_mask),
    _on_cpu(_SCHEDULES, "forward_backward_no_pipelining", *_SCHEDULE),
    _on_cpu(_SCHEDULES, "forward_backward_pipelining_without_interleaving", *_SCHEDULE),
    _on_cpu(_SCHEDULES, "forward_backward_pipelining_with_interleaving", *_SCHEDULE),
    _on_cpu(_LANGUAGE, "setup_embeddings_and_output_layer", "self"),
    _on_cpu(f"{_OPTIMIZER}:FP32Optimizer", "__init__", "self", "optimizer", "config", "init_state_fn"),
    _on_cpu(
        f"{_OPTIMIZER}:Float16OptimizerWithFloat16Params",
        "__init__",
        *("self", "optimizer", "config", "grad_scaler", "init_state_fn"),
    ),
    _on_cpu(_OPTIMIZER, "get_grad_norm_fp32", "grads_for_norm", "norm_type", "grad_stats_parallel_group"),
    _on_cpu(_OPTIMIZER, "clip_grad_by_total_norm_fp32", "parameters", "max_norm", "total_norm", "use_decoupled_grad"),
    _on_cpu(_OPTIMIZER, "count_zeros_fp32", "parameters", "grad_stats_parallel_group", "..."),
    _on_cpu(f"{_SCALER}:MegatronGradScaler", "__init__", "self", "initial_scale"),
    _on_cpu(f"{_SCALER}:DynamicGradScaler", "__init__", "self", "initial_scale", "min_scale", "..."),
    _on_cpu(f"{_SCALER}:DynamicGradScaler", "load_state_dict", "self", "state_dict"),
    _on_cpu("megatron.core.tensor_parallel.data", "broadcast_data", "keys", "data", "datatype", "..."),
    _on_cpu("megatron.core.tensor_parallel", "broadcast_data", "keys", "data", "datatype", "..."),
)


@dataclass(frozen=True)
class _Applied:
    patch: _Patch
    owner: Any
    original: Callable[..., Any]
    replacement: Callable[..., Any]


_applied: list[_Applied] = []


def _not_the_shared_generator_warning(record: logging.LogRecord) -> bool:
    # Megatron warns when the CPU generator moved inside a fork of the CUDA one; here they are the same.
    return "CPU RNG state changed" not in record.getMessage()


def install() -> bool:
    """Apply the patches unless CUDA is available or they are on already; say whether this call applied them.

    Raises:
        MegatronMismatchError: this megatron-core is not one they were written for; nothing is patched then.
    """
    if _applied or torch.cuda.is_available():
        return False
    require_supported_version()
    found = []
    for patch in _PATCHES:
        owner = patch.find_owner()
        original = _checked(owner, patch)
        found.append(_Applied(patch, owner, original, patch.make(original)))
    for one in found:
        setattr(one.owner, one.patch.name, one.replacement)
    _applied.extend(found)
    logging.getLogger(_RANDOM).addFilter(_not_the_shared_generator_warning)
    return True


def _checked(owner: Any, patch: _Patch) -> Callable[..., Any]:
    """The function to patch, if it takes what the patch was written for."""
    wanted = patch.parameters
    if wanted[-1:] == ("...",):
        function = getattr(owner, patch.name, None)
        more = () if function is None else tuple(inspect.signature(function).parameters)[len(wanted) - 1 :]
        wanted = wanted[:-1] + more
    return require_parameters(owner, patch.name, wanted)


def uninstall() -> None:
    """Put back what `install` replaced; no effect where nothing is installed.

    Raises:
        MegatronMismatchError: someone patched one of the functions after us; nothing is put back then.
    """
    for one in _applied:
        if getattr(one.owner, one.patch.name) is not one.replacement:
            raise MegatronMismatchError(
                f"{one.owner.__name__}.{one.patch.name} was patched again; undo that patch first"
            )
    for one in _applied:
        setattr(one.owner, one.patch.name, one.original)
    _applied.clear()
    logging.getLogger(_RANDOM).removeFilter(_not_the_shared_generator_warning)


@contextmanager
def installed() -> Iterator[None]:
    """`install` on entry; `uninstall` on exit if it was this entry that installed."""
    ours = install()
    try:
        yield
    finally:
        if ours:
            uninstall()
