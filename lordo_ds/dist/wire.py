"""The collectives across replicas; every one is entered in the byte ledger."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lordo_ds.dist.ledger import ByteLedger, gather_bytes, reduction_bytes


class ReplicaWire:
    """The replica group of this rank: the ranks that hold the same shard in every replica.

    With one replica (`group` None) every operation is the identity and sends nothing.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, ledger: ByteLedger | None = None) -> None:
        self.group = group
        self.ledger = ledger or ByteLedger()
        self.replicas = 1 if group is None else dist.get_world_size(group)
        self.index = 0 if group is None else dist.get_rank(group)

    def sum_(self, tensor: Tensor, kind: str) -> Tensor:
        """Sum over replicas, in place; bitwise equal on all of them."""
        if self.replicas > 1 and tensor.numel():
            dist.all_reduce(tensor, group=self.group)
            self.ledger.add(kind, reduction_bytes(tensor.numel() * tensor.element_size(), self.replicas))
        return tensor

    def gather(self, vector: Tensor, kind: str) -> Tensor:
        """One row per replica: (replicas, n) from each replica's vector (n,)."""
        if self.replicas == 1:
            return vector.unsqueeze(0)
        rows = [torch.empty_like(vector) for _ in range(self.replicas)]
        dist.all_gather(rows, vector.contiguous(), group=self.group)
        self.ledger.add(kind, gather_bytes(vector.numel() * vector.element_size(), self.replicas))
        return torch.stack(rows)

    def broadcast_(self, tensor: Tensor, kind: str, source: int = 0) -> Tensor:
        """Copy the tensor of replica `source` to all, in place; only the source is charged for it."""
        if self.replicas > 1 and tensor.numel():
            assert self.group is not None
            contiguous = tensor.contiguous()
            dist.broadcast(contiguous, src=dist.get_global_rank(self.group, source), group=self.group)
            if contiguous is not tensor:
                tensor.copy_(contiguous)
            if self.index == source:
                self.ledger.add(kind, tensor.numel() * tensor.element_size())
        return tensor
