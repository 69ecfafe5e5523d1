"""What a training script reads of LoRDO in Megatron's own loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lordo_ds.comm.ledger import data_parallel_bytes
from lordo_ds.handle import RunHandle
from lordo_ds.optimizer import LoRDO
from lordo_ds.start_table import show_messages
from lordo_ds.status import describe_start, status_of
from megatron_patches.ddp import Replicas

logger = logging.getLogger("lordo_ds")


class TrainingHandle(RunHandle):
    """The handle of a run in Megatron's own loop; every data-parallel rank of a replica holds whole parameters."""

    def __init__(
        self,
        optimizer: LoRDO,
        replicas: Replicas,
        gradient_bytes: int,
        gradient_dtype: torch.dtype,
        take_over: Callable[[int], None],
    ) -> None:
        super().__init__(optimizer, replicas.groups)
        self.ddp_bytes_per_step = data_parallel_bytes(gradient_bytes, self.replicas, self.groups.layout.replica_size)
        self.gradient_dtype = gradient_dtype
        self._take_over = take_over
        show_messages(dist.get_rank())
        if dist.get_rank() == 0:
            for line in describe_start(self):
                logger.info(line)

    @property
    def driver(self) -> str:
        return "Megatron's own loop"

    def status(self) -> dict[str, Any]:
        """As `lordo_ds.status` of a DeepSpeed engine: mesh, next sync, state and bytes by kind, the last sync."""
        return status_of(self)

    def _after_final_sync(self, steps_taken_over: int) -> None:
        self._take_over(steps_taken_over)
