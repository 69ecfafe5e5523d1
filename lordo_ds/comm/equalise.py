"""Makes what no optimizer steps equal on all replicas: frozen parameters and buffers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lordo_ds.comm.checksum import checksum
from lordo_ds.comm.comm import Comm
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.core.local import local_part

logger = logging.getLogger("lordo_ds")


def warn_of_left_out(names: Sequence[str]) -> None:
    """Say which parameters require a gradient, and were not given to the optimizer."""
    if names:
        logger.warning(
            "LoRDO: %d parameters were not given to the optimizer and stay as they are: %s", len(names), names[0]
        )


@torch.no_grad()
def equalise_untrained(model: nn.Module, trained: Collection[Tensor], wire: ReplicaWire, device: torch.device) -> None:
    """Frozen parameters and buffers become those of replica 0, where any differs. Collective over replicas.

    At stage 3 and of DTensors it is the parts of this rank that travel; gathered copies are stale until the next
    refresh.
    """
    if wire.replicas == 1:
        return
    frozen = [p for p in model.parameters() if p not in trained]
    shards: list[Any] = [getattr(p, "ds_tensor", None) for p in frozen]
    stored = [local_part(p.data) if shard is None else shard.data for p, shard in zip(frozen, shards, strict=True)]
    tensors = [t for t in [*stored, *model.buffers()] if t.numel()]
    # Ranks that hold the same first: together they then divide what crosses replicas.
    for group in (wire.twins, wire):
        if group.size > 1:
            _equalise(tensors, group, device)


def _equalise(tensors: list[Tensor], group: Comm, device: torch.device) -> None:
    mine = torch.tensor([checksum(_bytes(t) for t in tensors)], dtype=torch.int64, device=device)
    sums = group.gather(mine, "start")
    if bool((sums == sums[0]).all()):
        return
    for tensor in tensors:
        # As bytes, which every backend and dtype agrees on, through the device that the backend serves.
        received = group.broadcast_(_bytes(tensor).to(device), "start")
        tensor.copy_(received.to(tensor.device).view(tensor.dtype).view(tensor.shape))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
