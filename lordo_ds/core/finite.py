"""Whether tensors are finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every element of every tensor is finite, without a mask of their size."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    for group in by_dtype.values():
        peaks = torch.stack([peak.float() for peak in torch._foreach_norm(group, float("inf"))])
        if not bool(torch.isfinite(peaks).all()):
            return False
    return True
