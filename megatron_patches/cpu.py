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

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

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


@dataclass(frozen=True)
class _Patch:
    module: str
    name: str
    parameters: tuple[str, ...]
    replacement: Callable[..., Any]


_RANDOM = "megatron.core.tensor_parallel.random"
_UTILS = "megatron.core.transformer.utils"
_SOFTMAX = "megatron.core.fusions.fused_softmax"  # imports the masks by name

_PATCHES = (
    _Patch("torch.cuda", "current_device", (), _current_device),
    _Patch("torch.cuda", "synchronize", ("device",), _synchronize),
    _Patch("torch.cuda", "manual_seed", ("seed",), _manual_seed),
    _Patch("torch.cuda", "get_rng_state", ("device",), _cuda_rng_state),
    _Patch(_RANDOM, "_get_cuda_rng_state", ("device", "clone", "graph_safe"), _get_rng_state),
    _Patch(_RANDOM, "_set_cuda_rng_state", ("new_state", "device", "graph_safe"), _set_rng_state),
    _Patch(_UTILS, "get_default_causal_mask", ("sq",), _causal_mask),
    _Patch(_SOFTMAX, "get_default_causal_mask", ("sq",), _causal_mask),
    _Patch(_UTILS, "get_sliding_window_causal_mask", ("sq", "skv", "window_size"), _sliding_window_causal_mask),
    _Patch(_SOFTMAX, "get_sliding_window_causal_mask", ("sq", "skv", "window_size"), _sliding_window_causal_mask),
)

_originals: list[tuple[Any, _Patch, Callable[..., Any]]] = []


def _not_the_shared_generator_warning(record: logging.LogRecord) -> bool:
    # Megatron warns when the CPU generator moved inside a fork of the CUDA one; here they are the same.
    return "CPU RNG state changed" not in record.getMessage()


def install() -> bool:
    """Apply the patches unless CUDA is available or they are on already; say whether this call applied them.

    Raises:
        MegatronMismatchError: this megatron-core is not one they were written for; nothing is patched then.
    """
    if _originals or torch.cuda.is_available():
        return False
    require_supported_version()
    found = []
    for patch in _PATCHES:
        module = importlib.import_module(patch.module)
        found.append((module, patch, require_parameters(module, patch.name, patch.parameters)))
    for module, patch, _ in found:
        setattr(module, patch.name, patch.replacement)
    _originals.extend(found)
    logging.getLogger(_RANDOM).addFilter(_not_the_shared_generator_warning)
    return True


def uninstall() -> None:
    """Put back what `install` replaced; no effect where nothing is installed.

    Raises:
        MegatronMismatchError: someone patched one of the functions after us; nothing is put back then.
    """
    for module, patch, _ in _originals:
        if getattr(module, patch.name) is not patch.replacement:
            raise MegatronMismatchError(f"{patch.module}.{patch.name} was patched again; undo that patch first")
    for module, patch, original in _originals:
        setattr(module, patch.name, original)
    _originals.clear()
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
