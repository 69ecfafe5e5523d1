"""What every wire format can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

SMALLEST_NORMAL = 2.0**-126  # normal in float32 and bfloat16: some devices flush what is below
# Elements worked on at once: few enough for a core's cache; on an accelerator, whose launches cost, what bounds the
# workspace.
_CHUNK, _CHUNK_OF_ACCELERATOR = 1 << 18, 1 << 24


class Codec(ABC):
    """One wire format. A message is one tensor of bytes, its length known from the number of elements."""

    name: str
    lossy: bool  # whether a message may leave an error
    block: int  # elements that share a scale

    @abstractmethod
    def message_bytes(self, numel: int, width: int = 4) -> int:
        """Exact length of the message of a vector; 0 for no elements.

        Args:
            width: bytes of an element of the vector; only "fp32" sends more for wider ones.
        """

    def encode_(self, values: Tensor) -> Tensor:
        """The message; `values` becomes the error, values - decode(message), subtracted elementwise in its dtype.

        Args:
            values: (numel,) float32 or float64, contiguous, finite; overwritten.

        Returns:
            (message_bytes,) uint8, on the device of values. Equal inputs give equal messages.
        """
        if values.dim() != 1 or values.dtype not in (torch.float32, torch.float64) or not values.is_contiguous():
            raise ValueError(
                f"LoRDO: values of shape {tuple(values.shape)}, {values.dtype}, strides {values.stride()} must be a "
                "contiguous vector in float32 or float64"
            )
        size = self.message_bytes(values.numel(), values.element_size())
        message = torch.empty(size, dtype=torch.uint8, device=values.device)
        if values.numel():
            self._encode_(values, message)
        return message

    def decode(self, message: Tensor, numel: int, like: Tensor) -> Tensor:
        """The vector that a message says: (numel,), of the dtype and on the device of `like`."""
        size = self.message_bytes(numel, like.element_size())
        if message.dtype != torch.uint8 or message.shape != (size,):
            raise ValueError(
                f"LoRDO: a message of shape {tuple(message.shape)}, {message.dtype} must be {size} bytes for {numel} "
                f"elements of {like.dtype} as {self.name}"
            )
        if numel == 0:
            return like.new_empty(0)
        message = message.to(like.device).contiguous()
        if message.storage_offset() % 8:  # a part of a longer message, where wider numbers cannot be read
            message = message.clone()
        return self._decode(message, numel, like)

    @abstractmethod
    def _encode_(self, values: Tensor, message: Tensor) -> None:
        """Fill the message of at least one element."""

    @abstractmethod
    def _decode(self, message: Tensor, numel: int, like: Tensor) -> Tensor: ...


def chunks(count: int, block: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Bounds of runs of whole blocks that are worked on at once."""
    step = max(1, (_CHUNK if device.type == "cpu" else _CHUNK_OF_ACCELERATOR) // block)
    for first in range(0, count, step):
        yield first, min(first + step, count)
