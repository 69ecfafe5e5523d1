"""Collectives of one process group, every one entered in a byte ledger."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from lordo_ds.dist.ledger import ByteLedger, gather_bytes, reduction_bytes


class Comm:
    """One group of ranks. Alone in it (`group` None), every operation is the identity and sends nothing.

    `kind` names in the ledger what was sent for. With NCCL, tensors that live on the host (offloaded optimizer
    state) travel through the device.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, ledger: ByteLedger | None = None) -> None:
        self.group = group
        self.ledger = ledger or ByteLedger()
        self.size = 1 if group is None else dist.get_world_size(group)
        self.index = 0 if group is None else dist.get_rank(group)
        self._staged = group is not None and dist.get_backend(group) == "nccl"

    def sum_(self, tensor: Tensor, kind: str) -> Tensor:
        """Sum over the ranks, in place; bitwise equal on all of them."""
        if self.size > 1 and tensor.numel():
            self._run(tensor, lambda t: dist.all_reduce(t, group=self.group))
            self.ledger.add(kind, reduction_bytes(tensor.numel() * tensor.element_size(), self.size))
        return tensor

    def max_(self, tensor: Tensor, kind: str) -> Tensor:
        """Maximum over the ranks, in place."""
        if self.size > 1:
            self._run(tensor, lambda t: dist.all_reduce(t, op=dist.ReduceOp.MAX, group=self.group))
            self.ledger.add(kind, reduction_bytes(tensor.numel() * tensor.element_size(), self.size))
        return tensor

    def broadcast_(self, tensor: Tensor, kind: str, source: int = 0) -> Tensor:
        """Copy the tensor of the group's rank `source` to all, in place; only the source is charged for it."""
        if self.size > 1 and tensor.numel():
            assert self.group is not None
            root = dist.get_global_rank(self.group, source)
            self._run(tensor, lambda t: dist.broadcast(t, src=root, group=self.group))
            if self.index == source:
                self.ledger.add(kind, tensor.numel() * tensor.element_size())
        return tensor

    def gather(self, row: Tensor, kind: str) -> Tensor:
        """Every rank's (n,), on all of them: (ranks, n)."""
        if self.size == 1 or not row.numel():
            return row.unsqueeze(0).expand(self.size, -1)
        device = self._device(row)
        rows = torch.empty(self.size, row.numel(), dtype=row.dtype, device=device)
        dist.all_gather_into_tensor(rows.view(-1), row.to(device).contiguous(), group=self.group)
        self.ledger.add(kind, gather_bytes(row.numel() * row.element_size(), self.size))
        return rows.to(row.device)

    def scatter_sum(self, rows: Tensor, kind: str) -> Tensor:
        """Row i of (ranks, n), summed over ranks, for rank i: (n,)."""
        if self.size == 1 or not rows.numel():
            return rows[0]
        device = self._device(rows)
        mine = torch.empty_like(rows[0], device=device)
        dist.reduce_scatter_tensor(mine, rows.to(device).contiguous().view(-1), group=self.group)
        self.ledger.add(kind, rows.numel() * rows.element_size() * (self.size - 1) // self.size)
        return mine.to(rows.device)

    def _device(self, tensor: Tensor) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self._staged else tensor.device

    def _run(self, tensor: Tensor, collective: Callable[[Tensor], object]) -> None:
        moved = tensor.to(self._device(tensor)).contiguous()
        collective(moved)
        if moved is not tensor:
            tensor.copy_(moved)
