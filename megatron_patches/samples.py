"""Do the replicas read different samples? A wrong sampler is otherwise seen in nothing but wasted work."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lordo_ds.comm.checksum import checksum
from lordo_ds.comm.wire import ReplicaWire

logger = logging.getLogger("lordo_ds")


class SampleCheck:
    """Remembers a checksum of the first batch that a model is trained on, to compare it at the run's first sync.

    Only whole numbers count, as tokens are; only the first pipeline stage is given them.
    """

    def __init__(self, chunk: nn.Module, first_stage: bool) -> None:
        self._first_stage = first_stage
        self._sum: int | None = None
        self._hook = chunk.register_forward_pre_hook(self._remember, with_kwargs=True) if first_stage else None

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        values = [*args, *kwargs.values()]
        tokens = [v for v in values if isinstance(v, Tensor) and v.dtype in (torch.int64, torch.int32)]
        self._sum = checksum(tokens) if tokens else None
        assert self._hook is not None
        self._hook.remove()

    def compare(self, wire: ReplicaWire) -> None:
        """Warn if two replicas began with the same samples. Collective over the replicas."""
        if not self._first_stage:
            return
        mine = [int(self._sum is not None), self._sum or 0]
        rows = wire.gather(torch.tensor(mine, dtype=torch.int64), "samples").tolist()
        same = [m for m, (known, value) in enumerate(rows) if known and mine[0] and value == mine[1]]
        if len(same) > 1:
            logger.warning(
                "LoRDO: replicas %s were given the same first samples, so all but one train for nothing: a sampler "
                "takes its rank and size from data_parallel_rank and data_parallel_size of `replicas`, or from "
                "parallel_state.get_data_parallel_rank() and get_data_parallel_world_size(), never from a group",
                same,
            )
