"""Tensor-parallel slices of a parameter, put together and cut again. Plain tensors, no processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def join_slices(slices: Sequence[Tensor], dim: int | None, stride: int = 1) -> Tensor:
    """What these slices, of equal shapes and in the order of their tensor-parallel ranks, were cut from.

    Args:
        dim: along which they were cut; None: each of them is the whole.
        stride: blocks along `dim` that were cut one by one: 2 for a gated `linear_fc1`, whose halves are gate and up.

    Raises:
        ValueError: a slice cannot hold that many blocks.
    """
    if dim is None or len(slices) == 1:
        return slices[0]
    if any(one.shape[dim] % stride for one in slices):
        raise ValueError(f"dimension {dim} of {tuple(slices[0].shape)} cannot be cut into {stride} blocks")
    blocks = [one.chunk(stride, dim) for one in slices]
    return torch.cat([of_slice[block] for block in range(stride) for of_slice in blocks], dim)


def cut_slice(whole: Tensor, dim: int | None, stride: int, index: int, count: int) -> Tensor:
    """The slice of tensor-parallel rank `index` of `count`; the inverse of `join_slices`.

    Raises:
        ValueError: the dimension cannot be cut into that many equal parts.
    """
    if dim is None or count == 1:
        return whole
    if whole.shape[dim] % (stride * count):
        raise ValueError(
            f"dimension {dim} of {tuple(whole.shape)} must be a multiple of {stride * count} "
            f"to be cut for {count} tensor-parallel ranks"
        )
    return torch.cat(whole.chunk(stride * count, dim)[index::count], dim)
