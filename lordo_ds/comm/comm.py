"""Collectives of one process group, every one entered in a byte ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lordo_ds.comm.ledger import ByteLedger, gather_bytes, reduction_bytes


class Comm:
    """One group of ranks. Alone in it (of one rank, or None), every operation is the identity and sends nothing.

    `kind` names in the ledger what was sent for. With NCCL, tensors that live on the host (offloaded optimizer
    state) travel through the device. What carries the bytes are `_all_reduce`, `_broadcast`, `_all_gather` and
    `_all_to_all`: a subclass whose ranks meet otherwise replaces these four.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.ledger = ByteLedger()
        self.size = 1 if group is None else dist.get_world_size(group)
        self.index = 0 if group is None else dist.get_rank(group)
        self._staged = group is not None and dist.get_backend(group) == "nccl"

    def sum_(self, tensor: Tensor, kind: str) -> Tensor:
        """Sum over the ranks, in place; bitwise equal on all of them."""
        if self.size > 1 and tensor.numel():
            self._run(tensor, lambda t: self._all_reduce(t, dist.ReduceOp.SUM))
            self.ledger.add(kind, reduction_bytes(tensor.numel() * tensor.element_size(), self.size))
        return tensor

    def max_(self, tensor: Tensor, kind: str) -> Tensor:
        """Maximum over the ranks, in place."""
        if self.size > 1:
            self._run(tensor, lambda t: self._all_reduce(t, dist.ReduceOp.MAX))
            self.ledger.add(kind, reduction_bytes(tensor.numel() * tensor.element_size(), self.size))
        return tensor

    def broadcast_(self, tensor: Tensor, kind: str, source: int = 0) -> Tensor:
        """Copy the tensor of the group's rank `source` to all, in place; the source is charged for all copies."""
        if self.size > 1 and tensor.numel():
            self._run(tensor, lambda t: self._broadcast(t, source))
            if self.index == source:
                self.ledger.add(kind, tensor.numel() * tensor.element_size() * (self.size - 1))
        return tensor

    def gather(self, row: Tensor, kind: str) -> Tensor:
        """Every rank's (n,), on all of them: (ranks, n)."""
        if self.size == 1 or not row.numel():
            return row.unsqueeze(0).expand(self.size, -1)
        rows = self._all_gather(row.to(self._device(row)).contiguous())
        self.ledger.add(kind, gather_bytes(row.numel() * row.element_size(), self.size))
        return rows.to(row.device)

    def _all_reduce(self, tensor: Tensor, operation: Any) -> None:
        """A contiguous tensor, in place; `operation` is a `ReduceOp`."""
        dist.all_reduce(tensor, op=operation, group=self.group)

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        """A contiguous tensor of the group's rank `source`, in place."""
        assert self.group is not None
        dist.broadcast(tensor, src=dist.get_global_rank(self.group, source), group=self.group)

    def _all_gather(self, row: Tensor) -> Tensor:
        """Every rank's contiguous (n,): (ranks, n)."""
        rows = row.new_empty(self.size, row.numel())
        dist.all_gather_into_tensor(rows.view(-1), row, group=self.group)
        return rows

    def _all_to_all(self, outgoing: Tensor, leaving: Sequence[int], arriving: Sequence[int]) -> Tensor:
        """The first `leaving[0]` elements to rank 0, and so on; what all sent here, `arriving[0]` first from rank 0."""
        incoming = outgoing.new_empty(sum(arriving))
        dist.all_to_all_single(incoming, outgoing, list(arriving), list(leaving), group=self.group)
        return incoming

    def _device(self, tensor: Tensor) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self._staged else tensor.device

    def _run(self, tensor: Tensor, collective: Callable[[Tensor], object]) -> None:
        moved = tensor.to(self._device(tensor)).contiguous()
        collective(moved)
        if moved is not tensor:
            tensor.copy_(moved)
