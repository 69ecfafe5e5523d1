"""What a saved run is to those who read it: whole parameters by name and replica, however they were divided."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lordo_ds.checkpoint.header import Counters
from lordo_ds.checkpoint.pieces import State


@dataclass(frozen=True)
class SavedParameter:
    """One trained parameter; the shape is that of a model without tensor parallelism."""

    name: str
    shape: tuple[int, ...]
    low_rank: bool
    side: str = ""
    rank: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class EngineState:
    """What the engine saved beside the model and the optimizer, and what its user gave it to keep.

    `param_groups` are those of the optimizer without their tensors, `loss_scale` the values of fp16's loss scaler.
    """

    global_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0
    lr_scheduler: Any = None
    param_groups: list[dict[str, Any]] = field(default_factory=list)
    loss_scale: dict[str, float | int] = field(default_factory=dict)
    client_state: dict[str, Any] = field(default_factory=dict)


class SavedRun(ABC):
    """A checkpoint, opened without processes and without the model. Tensors are read when they are asked for.

    Attributes:
        path: the directory.
        settings: the optimizer's, of the JSON block.
        mesh: in words, how it was saved.
        parameters: by name, in the order of the model.
    """

    path: Path
    replicas: int
    settings: dict[str, Any]
    mesh: str
    parameters: dict[str, SavedParameter]

    @abstractmethod
    def state(self, name: str, replica: int) -> State:
        """A parameter's whole state on one replica: `weight`, and what the optimizer keeps of it by name.

        The tensors may be views of the file: they are not to be changed.
        """

    @abstractmethod
    def check_state(self, name: str, replica: int) -> None:
        """Check that `state` will find everything, without reading it.

        Raises:
            CheckpointError: something is missing, or of another size.
        """

    @abstractmethod
    def counters(self, replica: int) -> Counters:
        """Steps and syncs."""

    @abstractmethod
    def untrained(self, replica: int) -> dict[str, Tensor]:
        """Frozen parameters, whole, and buffers."""

    @abstractmethod
    def engine_state(self, replica: int) -> EngineState:
        """What the engine and its user saved."""

    @abstractmethod
    def bytes_sent(self, replica: int) -> dict[str, int]:
        """The ledger of the replica's first rank."""

    @abstractmethod
    def rows(self) -> list[list[float]]:
        """Rows that wait for the next sync, averaged over all ranks."""

    @property
    def synced(self) -> bool:
        """Whether it was saved at a sync: the replicas hold equal weights."""
        return all(self.counters(m).synced for m in range(self.replicas))


def mean_rows(tables: list[list[list[float]]]) -> list[list[float]]:
    """Rows averaged over ranks; none where the ranks have recorded different numbers of them."""
    shapes = {tuple(len(row) for row in table) for table in tables}
    if len(shapes) != 1:
        return []
    return [[sum(values) / len(values) for values in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]
