"""The collectives across replicas."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from lordo_ds.dist.comm import Comm
from lordo_ds.dist.ledger import ByteLedger


class SyncError(RuntimeError):
    """The replicas, or the copies inside one, can no longer be trusted to be equal; training must not go on."""


class ReplicaWire(Comm):
    """The replica group of this rank: the ranks that hold the same shard in every replica."""

    def __init__(self, group: dist.ProcessGroup | None = None, ledger: ByteLedger | None = None) -> None:
        super().__init__(group, ledger)
        self.replicas = self.size

    def assert_same(self, what: str, values: Tensor) -> None:
        """Refuse to go on where one number per replica differs."""
        if not bool((values == values[0]).all()):
            raise SyncError(f"LoRDO: the replicas are out of step: {what} {values.tolist()}")
