"""The collectives across replicas."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from lordo_ds.comm.comm import Comm
from lordo_ds.comm.inside import InsideComm
from lordo_ds.errors import SyncError


class ReplicaWire(Comm):
    """The replica group of this rank: the ranks that hold the same shard in every replica.

    `twins` are the ranks of this replica that hold what this one holds (all of them at ZeRO 0). Each takes one part of
    a sum or a broadcast across replicas, and they tell one another the result: links between replicas carry it once.
    `steps_alike`: all replicas have made all steps.
    """

    steps_alike = True

    def __init__(self, group: dist.ProcessGroup | None = None, twins: InsideComm | None = None) -> None:
        super().__init__(group)
        self.replicas = self.size
        self.twins = twins or InsideComm()

    def sum_(self, tensor: Tensor, kind: str) -> Tensor:
        """Sum over the replicas, in place; bitwise equal on all of them, and on the twins, which call it together."""
        sum_ = super().sum_
        return self._divided(tensor, kind, lambda part: sum_(part, kind))

    def broadcast_(self, tensor: Tensor, kind: str, source: int = 0) -> Tensor:
        """Copy the tensor of replica `source` to all, in place. The twins, which hold the same, call it together."""
        broadcast_ = super().broadcast_
        return self._divided(tensor, kind, lambda part: broadcast_(part, kind, source))

    def _divided(self, tensor: Tensor, kind: str, across: Callable[[Tensor], Tensor]) -> Tensor:
        """An operation across replicas, in place, on as many parts as there are twins: each of them has one."""
        if self.size == 1 or self.twins.size == 1 or not tensor.numel():
            return across(tensor)
        share = self._share(tensor.numel())
        own = tensor.reshape(-1)[self.twins.index * share :][:share]
        part = own.new_zeros(share)  # the last ones may be padded, so that all twins send the same
        part[: own.numel()] = own
        everything = self.twins.gather(across(part), kind).view(-1)
        return tensor.copy_(everything[: tensor.numel()].view_as(tensor))

    def _share(self, numel: int) -> int:
        return -(-numel // self.twins.size)

    def assert_same(self, what: str, values: Tensor) -> None:
        """Refuse to go on where one number per replica differs."""
        if not bool((values == values[0]).all()):
            raise SyncError(f"LoRDO: the replicas are out of step: {what} {values.tolist()}")
