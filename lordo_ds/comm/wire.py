"""The collectives across replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
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

    def swap(self, leaving: Sequence[Tensor], arriving: Sequence[int], kind: str) -> list[Tensor]:
        """`leaving[m]` to replica m; what each replica sent here, `arriving[m]` bytes from replica m.

        The twins, which hold the same, call it together: each sends its part of every message, and they tell one
        another what came.

        Args:
            leaving: uint8, (n,) each.
        """
        if self.size == 1:
            return list(leaving)
        parts = [self._part_of(message) for message in leaving]
        lengths = [self._length_of_part(length) for length in arriving]
        outgoing = torch.cat(parts)
        leaves = [len(part) for part in parts]
        with self._sending(kind, len(outgoing) - leaves[self.index]):
            incoming = self._all_to_all(outgoing.to(self._device(outgoing)), leaves, lengths)
        if self.twins.size == 1:
            return list(incoming.split(lengths))
        # (twins, shares of all messages), each as long as the longest of its twins
        shares = [self._share(length) for length in arriving]
        own = incoming.new_zeros(sum(shares))
        for part, room in zip(incoming.split(lengths), own.split(shares), strict=True):
            room[: len(part)] = part
        columns = self.twins.gather(own, kind).split(shares, dim=1)
        return [column.reshape(-1)[:length] for column, length in zip(columns, arriving, strict=True)]

    def spread(self, message: Tensor, arriving: Sequence[int], kind: str) -> list[Tensor]:
        """This replica's message (n,) to all; everybody's, `arriving[m]` bytes from replica m. See `swap`."""
        return self.swap([message] * self.size, arriving, kind)

    def _part_of(self, message: Tensor) -> Tensor:
        """The part that this one of the twins sends."""
        share = self._share(len(message))
        return message[self.twins.index * share :][:share]

    def _length_of_part(self, length: int) -> int:
        share = self._share(length)
        return max(0, min(share, length - self.twins.index * share))

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
