"""Wire formats without scales: the numbers themselves, or rounded to bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lordo_ds.core.codec.base import Codec, chunks


@dataclass(frozen=True)
class Plain(Codec):
    """The numbers themselves, in their own width."""

    name = "fp32"
    lossy = False
    block = 1

    def message_bytes(self, numel: int, width: int = 4) -> int:
        return numel * width

    def _encode_(self, values: Tensor, message: Tensor) -> None:
        message.copy_(values.view(torch.uint8))
        values.zero_()

    def _decode(self, message: Tensor, numel: int, like: Tensor) -> Tensor:
        return message.view(like.dtype).clone()


@dataclass(frozen=True)
class Bf16(Codec):
    """Rounded to the nearest bfloat16, ties to even."""

    name = "bf16"
    lossy = True
    block = 1

    def message_bytes(self, numel: int, width: int = 4) -> int:
        return 2 * numel

    def _encode_(self, values: Tensor, message: Tensor) -> None:
        rounded = message.view(torch.bfloat16)
        for a, b in chunks(values.numel(), 1, values.device):
            rounded[a:b] = values[a:b]
            values[a:b] -= rounded[a:b]

    def _decode(self, message: Tensor, numel: int, like: Tensor) -> Tensor:
        return message.view(torch.bfloat16).to(like.dtype)
