"""The random-number generators of a process, saved and restored, so that dropout goes on as if never interrupted."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

_MEGATRON = "megatron.core.tensor_parallel.random"


def rng_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's generators, of this rank's device, and of Megatron's where it is in use.

    Tensors and plain values only: `torch.load(weights_only=True)` reads it back.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = (
            str(kind),
            torch.from_numpy(keys.astype("int64")),
            int(position),
            int(has_gauss),
            float(cached),
        )
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    tracker = _megatron_tracker()
    if tracker is not None:
        state["megatron"] = {
            name: value for name, value in tracker.get_states().items() if isinstance(value, torch.Tensor)
        }
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; generators that this process lacks, or did not save, are left alone."""
    if "python" in state:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
    if "torch" in state:
        torch.set_rng_state(state["torch"].cpu())
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        kind, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    tracker = _megatron_tracker()
    if tracker is not None and state.get("megatron"):
        tracker.set_states({**tracker.get_states(), **state["megatron"]})


def _megatron_tracker() -> Any:
    """Megatron's generators of tensor-parallel ranks; None where the program has not loaded Megatron."""
    module = sys.modules.get(_MEGATRON)
    return None if module is None else module.get_cuda_rng_tracker()
