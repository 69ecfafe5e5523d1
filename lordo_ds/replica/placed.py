"""Where what has one value per element is kept: beside the weights, or on the host of an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor

from lordo_ds.config import AnchorPlacement


def placed(tensor: Tensor, anchor: AnchorPlacement, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of the tensor where `anchor` says; by default pinned host memory for CUDA tensors."""
    device = anchor.device or ("cpu" if tensor.is_cuda else "same")
    if tensor.dtype == torch.float64:
        dtype = torch.float64
    elif dtype is None:
        dtype = torch.bfloat16 if anchor.dtype == "bf16" else torch.float32
    if device == "same" or not tensor.is_cuda:
        return tensor.detach().to(dtype, copy=True)
    host = torch.empty(tensor.shape, dtype=dtype, pin_memory=True)
    return host.copy_(tensor.detach())
