"""Collectives of one process group, every one entered in a byte ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lordo_ds.comm.ledger import ByteLedger, gather_bytes, reduction_bytes
from lordo_ds.comm.slow_link import SlowLink


class Comm:
    """One group of ranks. Alone in it (of one rank, or None), every operation is the identity and sends nothing.

    `kind` names in the ledger what was sent for. With NCCL, tensors that live on the host (offloaded optimizer
    state) travel through the device. What carries the bytes are `_all_reduce`, `_broadcast`, `_all_gather` and
    `_all_to_all`: a subclass whose ranks meet otherwise replaces these four. All that is sent goes through `_sending`.

    `slow_link` is imitated where there is one: on the wire across replicas only.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.ledger = ByteLedger()
        self.slow_link: SlowLink | None = None
        self.size = 1 if group is None else dist.get_world_size(group)
        self.index = 0 if group is None else dist.get_rank(group)
        self._staged = group is not None and dist.get_backend(group) == "nccl"

    def sum_(self, tensor: Tensor, kind: str) -> Tensor:
        """Sum over the ranks, in place; bitwise equal on all of them."""
        if tensor.numel():
            self._reduce_(tensor, kind, dist.ReduceOp.SUM)
        return tensor

    def max_(self, tensor: Tensor, kind: str) -> Tensor:
        """Maximum over the ranks, in place."""
        self._reduce_(tensor, kind, dist.ReduceOp.MAX)
        return tensor

    def _reduce_(self, tensor: Tensor, kind: str, operation: Any) -> None:
        if self.size > 1:
            sent_bytes = reduction_bytes(tensor.numel() * tensor.element_size(), self.size)
            with self._sending(kind, sent_bytes, hops=2 * (self.size - 1)):
                self._run(tensor, lambda t: self._all_reduce(t, operation))

    def broadcast_(self, tensor: Tensor, kind: str, source: int = 0) -> Tensor:
        """Copy the tensor of the group's rank `source` to all, in place; the source is charged for all copies."""
        if self.size > 1 and tensor.numel():
            copies_bytes = tensor.numel() * tensor.element_size() * (self.size - 1)
            sent_bytes = copies_bytes if self.index == source else 0
            with self._sending(kind, sent_bytes, slowest_bytes=copies_bytes):
                self._run(tensor, lambda t: self._broadcast(t, source))
        return tensor

    def gather(self, row: Tensor, kind: str) -> Tensor:
        """Every rank's (n,), on all of them: (ranks, n)."""
        if self.size == 1 or not row.numel():
            return row.unsqueeze(0).expand(self.size, -1)
        with self._sending(kind, gather_bytes(row.numel() * row.element_size(), self.size), hops=self.size - 1):
            return self._all_gather(row.to(self._device(row)).contiguous()).to(row.device)

    @contextmanager
    def _sending(self, kind: str, sent_bytes: int, hops: int = 1, slowest_bytes: int | None = None) -> Iterator[None]:
        """Around everything that is sent or received: enters it in the ledger, with the time that the block took.

        With NCCL that is until the collective has been queued and what has to be on the host is there; it goes on after
        that. A collective that fails is not entered.

        Args:
            sent_bytes: by this rank.
            hops: messages that wait for one another, see `SlowLink`.
            slowest_bytes: what the rank sends that sends most, where that is known and may be another.
        """
        began = time.perf_counter()
        yield
        if self.slow_link is not None:
            if self._staged:
                torch.cuda.current_stream().synchronize()
            self.slow_link.wait(began, sent_bytes if slowest_bytes is None else slowest_bytes, hops)
        self.ledger.add(kind, sent_bytes, time.perf_counter() - began)

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
