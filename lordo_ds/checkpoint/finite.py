"""Whether what was saved is finite, and what follows from it.

A replica's own tensors may honestly hold a NaN between syncs: the next sync leaves that replica out and gives it the
state of the others. So a load refuses them only where no replica is left to take it from. What the replicas agreed on
at a sync (the anchor, the outer momentum) came from finite replicas alone, and is finite in every honest save.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lordo_ds.errors import CheckpointError

_AGREED = ("anchor", "outer_momentum")


class NotFinite(NamedTuple):
    """One tensor with a NaN or an infinity in it."""

    replica: int
    parameter: str
    entry: str


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are; without a copy of them."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) and torch.isfinite(high))


def not_finite(replica: int, parameter: str, entries: Mapping[str, Any]) -> list[NotFinite]:
    """Which of a parameter's saved tensors are not. Reads them."""
    return [
        NotFinite(replica, parameter, entry)
        for entry, value in entries.items()
        if isinstance(value, Tensor) and not is_finite(value)
    ]


def replicas_to_reseed(found: Iterable[NotFinite], replicas: int, where: str) -> list[int]:
    """The replicas whose own tensors are not finite, which the next sync will leave out and reseed.

    Raises:
        CheckpointError: none is left, or something is not finite that no honest save holds so.
    """
    found = sorted(found)
    agreed = [one for one in found if one.entry in _AGREED]
    spoilt = sorted({one.replica for one in found})
    if agreed or len(spoilt) == replicas:
        replica, parameter, entry = (agreed or found)[0]
        others = "" if agreed or replicas == 1 else ", and no other replica's state is"
        raise CheckpointError(
            f"LoRDO: {where}: {entry!r} of {parameter} is not finite in replica {replica}{others}: choose another tag"
        )
    return spoilt
