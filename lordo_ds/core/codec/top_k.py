"""The sparse wire format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lordo_ds.core.codec.base import SMALLEST_NORMAL, Codec, chunks
from lordo_ds.core.codec.bits import pack_, stream_bytes, unpack

_STACKED = 8  # rows that a block is cut into


@dataclass(frozen=True)
class TopKSparse(Codec):
    """The largest few elements of each block, the others zero: SparseLoCo's, arXiv 2508.15706, two bits for a value.

    Those sent of a block, in the order of their size, are cut into 4 groups (as many as are sent, where those are
    fewer), as equal as can be and the last ones longer, and each group has one magnitude, its mean: an element's place
    in the order says which is its own, which costs nothing. A last block of n elements sends ceil(k n / block).

    The message: the magnitudes of all blocks, bfloat16, the largest first; then for each element that is sent its
    position in the block, in ceil(log2(block)) bits, and 1 bit that is set for negative ones, without gaps.
    """

    top_k: int
    block: int

    name = "top_k"
    lossy = True

    def sent(self, numel: int) -> int:
        """Elements sent of a vector."""
        whole, rest = divmod(numel, self.block)
        return whole * self.top_k + -(-self.top_k * rest // self.block)

    def message_bytes(self, numel: int, width: int = 4) -> int:
        whole, rest = divmod(numel, self.block)
        magnitudes = whole * _groups(self.top_k) + _groups(self.sent(rest))
        return 2 * magnitudes + stream_bytes(self.sent(numel), self._width)

    @property
    def _position_bits(self) -> int:
        return (self.block - 1).bit_length()

    @property
    def _width(self) -> int:
        return self._position_bits + 1

    def _encode_(self, values: Tensor, message: Tensor) -> None:
        magnitudes, stream = self._split(message, values.numel())
        parts = [self._select_(rows) for rows in self._rows(values)]
        torch.cat([of_groups.view(-1) for of_groups, _ in parts], out=magnitudes)
        pack_(stream, torch.cat([codes.view(-1) for _, codes in parts]), self._width)

    def _decode(self, message: Tensor, numel: int, like: Tensor) -> Tensor:
        magnitudes, stream = self._split(message, numel)
        codes = unpack(stream, self.sent(numel), self._width)
        positions = codes.bitwise_and(2**self._position_bits - 1)
        negative = codes.bitwise_right_shift_(self._position_bits).bool()
        out = like.new_zeros(numel)
        sent = groups = 0
        for rows in self._rows(out):
            n, k = rows.shape[0], self.sent(rows.shape[1])
            here, sent = slice(sent, sent + n * k), sent + n * k
            of_groups, groups = magnitudes[groups : groups + n * _groups(k)].view(n, -1), groups + n * _groups(k)
            values = _signed(of_groups, negative[here].view(n, k))
            rows.scatter_(1, positions[here].view(n, k), values.to(out.dtype))
        return out

    def _split(self, message: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """Magnitudes, and the stream of positions and signs."""
        codes = stream_bytes(self.sent(numel), self._width)
        return message[: message.numel() - codes].view(torch.bfloat16), message[message.numel() - codes :]

    def _rows(self, values: Tensor) -> Iterator[Tensor]:
        """Views (n, block) of whole blocks, and (1, rest) of what remains."""
        whole = values.numel() // self.block
        for a, b in chunks(whole, self.block, values.device):
            yield values[a * self.block : b * self.block].view(-1, self.block)
        if values.numel() % self.block:
            yield values[whole * self.block :].unsqueeze(0)

    def _select_(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Magnitudes (n, groups) and codes (n, k) int16 of what is sent of these blocks; rows become the error."""
        k = self.sent(rows.shape[1])
        largest, positions = _largest(rows.abs(), k)
        of_groups = torch.stack([largest[:, a:b].div(b - a).sum(1) for a, b in _group_bounds(k)], 1)
        of_groups = of_groups.to(torch.bfloat16)
        of_groups *= of_groups >= SMALLEST_NORMAL
        values = rows.gather(1, positions)
        negative = values < 0
        rows.scatter_(1, positions, values - _signed(of_groups, negative))
        return of_groups, positions.add_(negative, alpha=2**self._position_bits).to(torch.int16)


def _largest(sizes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of sizes (n, block), in the order of their size, and their positions."""
    block = sizes.shape[1]
    if block % _STACKED or block < 2 * _STACKED * k:
        largest, positions = sizes.topk(k, 1)
        return largest, positions
    # Sorting is what costs. The k largest are in the k columns whose maxima are largest: only those are sorted.
    stacks = sizes.view(-1, _STACKED, block // _STACKED)
    columns = stacks.amax(1).topk(k, 1, sorted=False).indices
    candidates = stacks.gather(2, columns.unsqueeze(1).expand(-1, _STACKED, -1)).flatten(1)
    largest, at = candidates.topk(k, 1)
    return largest, columns.gather(1, at % k).add_(at.div_(k, rounding_mode="floor"), alpha=block // _STACKED)


def _groups(sent: int) -> int:
    """Magnitudes of so many elements of a block."""
    return min(4, sent)


def _group_bounds(sent: int) -> list[tuple[int, int]]:
    groups = _groups(sent)
    return [(group * sent // groups, (group + 1) * sent // groups) for group in range(groups)]


def _signed(of_groups: Tensor, negative: Tensor) -> Tensor:
    """The numbers of elements in the order of their size: (n, k) float32 from magnitudes (n, groups)."""
    bounds = _group_bounds(negative.shape[1])
    sizes = [magnitude.expand(-1, b - a) for magnitude, (a, b) in zip(of_groups.split(1, 1), bounds, strict=True)]
    magnitudes = torch.cat(sizes, 1).float()
    return torch.where(negative, -magnitudes, magnitudes)
