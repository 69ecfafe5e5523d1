"""Wire formats of whole levels, with a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lordo_ds.core.codec.base import SMALLEST_NORMAL, Codec, chunks
from lordo_ds.core.codec.bits import stream_bytes


@dataclass(frozen=True)
class BlockQuantized(Codec):
    """Whole levels from -levels to levels, times one bfloat16 scale for each block.

        scale = max |x| / levels, rounded up      (0 for a block of zeros, else at least 2^-126)
        level = x / scale, rounded to nearest

    Rounding up keeps the largest element within the levels; |error| is at most scale / 2. The message: the scales, then
    the levels, two's complement, in 8 bits, or in 4: the even elements in the lower half of a byte.
    """

    name: str
    block: int
    bits: int  # 8 or 4

    lossy = True

    @property
    def levels(self) -> int:
        return (1 << self.bits - 1) - 1

    def message_bytes(self, numel: int, width: int = 4) -> int:
        return 2 * -(-numel // self.block) + stream_bytes(numel, self.bits)

    def _encode_(self, values: Tensor, message: Tensor) -> None:
        scales, codes, whole = self._split(message, values.numel())
        for a, b in chunks(whole, self.block, values.device):
            rows = values[a * self.block : b * self.block].view(-1, self.block)
            scales[a:b], codes[self._bytes(a) : self._bytes(b)] = self._quantize_(rows)
        rest = values[whole * self.block :]
        if rest.numel():
            row = _padded(rest, self.block)
            scales[whole:], filled = self._quantize_(row)
            codes[self._bytes(whole) :] = filled[: codes.numel() - self._bytes(whole)]
            rest.copy_(row[0, : rest.numel()])

    def _decode(self, message: Tensor, numel: int, like: Tensor) -> Tensor:
        scales, codes, whole = self._split(message, numel)
        out = like.new_empty(numel)
        for a, b in chunks(whole, self.block, like.device):
            rows = self._dequantize(scales[a:b], codes[self._bytes(a) : self._bytes(b)])
            out[a * self.block : b * self.block] = rows.view(-1)
        rest = out[whole * self.block :]
        if rest.numel():
            filled = _padded(codes[self._bytes(whole) :], self._bytes(1)).view(-1)
            rest.copy_(self._dequantize(scales[whole:], filled)[0, : rest.numel()])
        return out

    def _split(self, message: Tensor, numel: int) -> tuple[Tensor, Tensor, int]:
        """Scales, levels, and how many blocks are whole."""
        scales = 2 * -(-numel // self.block)
        return message[:scales].view(torch.bfloat16), message[scales:], numel // self.block

    def _bytes(self, blocks: int) -> int:
        return blocks * self.block * self.bits // 8

    def _quantize_(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (n,) bfloat16 and levels, bytes, of rows (n, block); rows become the error."""
        largest = rows.abs().amax(1).float()
        scales = _bf16_not_below((largest / self.levels).clamp_min_(SMALLEST_NORMAL))
        scale = scales.float().unsqueeze(1)
        levels = rows.float().div(scale).round_()
        whole = levels.to(torch.int8).view(-1)
        rows -= levels.mul_(scale)
        return scales.mul_(largest > 0), self._pack(whole)

    def _dequantize(self, scales: Tensor, codes: Tensor) -> Tensor:
        levels = self._unpack(codes).view(-1, self.block)
        return levels.float().mul_(scales.float().unsqueeze(1))

    def _pack(self, levels: Tensor) -> Tensor:
        if self.bits == 8:
            return levels.view(torch.uint8)
        pairs = levels.view(torch.int16)  # the even element in the lower byte
        return pairs.bitwise_and(0x0F).bitwise_or_(pairs.bitwise_right_shift(4).bitwise_and_(0xF0)).to(torch.uint8)

    def _unpack(self, codes: Tensor) -> Tensor:
        if self.bits == 8:
            return codes.view(torch.int8)
        both = codes.to(torch.int16)
        pairs = both.bitwise_and(0x0F).bitwise_or_(both.bitwise_left_shift_(4).bitwise_and_(0x0F00))
        return pairs.bitwise_xor_(0x0808).view(torch.int8).sub_(8)  # the sign of four bits becomes that of eight


def _padded(part: Tensor, length: int) -> Tensor:
    """(1, length): a short vector, and zeros after it."""
    row = part.new_zeros(1, length)
    row[0, : part.numel()] = part
    return row


def _bf16_not_below(positive: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below a positive float32: its bits, rounded up."""
    return positive.view(torch.int32).add(0xFFFF).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
