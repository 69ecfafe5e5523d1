"""What of a tensor lies on this rank."""

from __future__ import annotations

from torch import Tensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is distributed (torch's DTensor), sharing its memory; any other as it is."""
    if not is_distributed(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part.detach()


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this rank holds a part."""
    return type(tensor).__name__ == "DTensor"  # a Parameter of one too
