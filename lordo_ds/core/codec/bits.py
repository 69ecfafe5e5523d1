"""Whole numbers of any width as one stream of bits, and back: integer arithmetic only.

Eight codes fill as many whole bytes as a code has bits, so every eight are packed alike, all of them at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 1 << 20  # codes, a multiple of 8: bounds the workspace


def stream_bytes(codes: int, width: int) -> int:
    """Bytes of a stream of so many codes; only the last byte may be padded."""
    return -(-codes * width // 8)


def pack_(stream: Tensor, codes: Tensor, width: int) -> None:
    """Write codes one after another, each with its lowest bit first, bytes filled from their lowest bit.

    Args:
        stream: (stream_bytes(n, width),) uint8, overwritten.
        codes: (n,) whole numbers, each >= 0 and below 2^width; width at most 23.
    """
    for some, filled in zip(codes.split(_AT_ONCE), stream.split(_AT_ONCE // 8 * width), strict=True):
        of_eight = _columns(some, 8)
        columns = torch.empty(width, of_eight.shape[1], dtype=torch.uint8, device=stream.device)
        for byte, column in enumerate(columns):
            first, last = 8 * byte // width, (8 * byte + 7) // width
            column.copy_(_joined([(of_eight[code], width * code - 8 * byte) for code in range(first, last + 1)]))
        filled.copy_(columns.t().reshape(-1)[: filled.numel()])


def unpack(stream: Tensor, codes: int, width: int) -> Tensor:
    """The codes of a stream, (codes,) int64; width at most 23."""
    out = torch.empty(codes, dtype=torch.int64, device=stream.device)
    for some, filled in zip(out.split(_AT_ONCE), stream.split(_AT_ONCE // 8 * width), strict=True):
        of_bytes = _columns(filled, width)
        columns = torch.empty(8, of_bytes.shape[1], dtype=torch.int64, device=stream.device)
        for code, column in enumerate(columns):
            first, last = width * code // 8, (width * code + width - 1) // 8
            column.copy_(_joined([(of_bytes[byte], 8 * byte - width * code) for byte in range(first, last + 1)]))
        some.copy_(columns.bitwise_and_(2**width - 1).t().reshape(-1)[: some.numel()])
    return out


def _columns(numbers: Tensor, count: int) -> Tensor:
    """(count, n) int32: the numbers dealt out in turn, and zeros after the last."""
    filled = torch.nn.functional.pad(numbers, (0, -numbers.numel() % count))
    return filled.view(-1, count).t().to(torch.int32, memory_format=torch.contiguous_format)


def _joined(parts: list[tuple[Tensor, int]]) -> Tensor:
    """The bits of all the parts, each shifted up by so many, or down."""
    joined = torch.zeros_like(parts[0][0])
    for number, up in parts:
        joined |= number << up if up >= 0 else number >> -up
    return joined
