"""Checksums of bit patterns: equal tensors agree, a flipped sign or a swapped pair of values does not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 20
# Odd 64-bit constants of the splitmix64 finaliser; products wrap modulo 2^64.
_POSITION = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_COMBINE = 1_000_003


def checksum(tensors: Iterable[Tensor]) -> int:
    """A 64-bit sum of hashes of (bit pattern, position) over all tensors, in order."""
    total: Tensor | None = None
    for tensor in tensors:
        part = _tensor_checksum(tensor.detach())
        total = part if total is None else total.to(part.device) * _COMBINE + part
    return 0 if total is None else int(total)


def _tensor_checksum(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().flatten()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    bits = flat.view(integers)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        positions = torch.arange(start, start + chunk.numel(), dtype=torch.int64, device=flat.device)
        total += _mix(chunk + positions * _POSITION).sum()
    return total


def _mix(bits: Tensor) -> Tensor:
    """Every bit of the input moves about half the bits of the output (splitmix64)."""
    # torch shifts arithmetically; with the sign repeated, x and ~x would hash alike.
    bits = (bits ^ ((bits >> 30) & ((1 << 34) - 1))) * _MIX_1
    bits = (bits ^ ((bits >> 27) & ((1 << 37) - 1))) * _MIX_2
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))
