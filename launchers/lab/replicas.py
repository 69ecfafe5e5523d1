"""M replicas in one process: the product's optimizers and outer sync, with a wire that never leaves the process.

Each replica has its own `LoRDO` optimizer, attached through `LoRDO.attach` as an engine would attach it. What crosses
replicas goes through `VirtualWire`, which has the real wire's interface and ledger; replicas meet in it on one thread
each. Sums are made once, in the order of the replicas, so a run is a function of its arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.core.fragments import FlatTensor
from lordo_ds.core.grouping import ParameterFacts
from lordo_ds.optimizer import LoRDO
from lordo_ds.sync.outer_sync import OuterSync

_T = TypeVar("_T")
_MEETING_TIMEOUT_S = 600.0


class MeetingRoom:
    """Where the replicas of one process meet: one slot each, and a barrier."""

    def __init__(self, replicas: int) -> None:
        self.slots: list[Any] = [None] * replicas
        self.result: Any = None
        self.barrier = threading.Barrier(replicas)

    def exchange(self, index: int, mine: _T, combine: Callable[[list[_T]], Any]) -> Any:
        """`combine` of all replicas' values, in their order, computed once; everybody gets the same object.

        Nobody passes the first barrier of the next exchange before all have taken the result of this one.
        """
        self.slots[index] = mine
        if self.barrier.wait(_MEETING_TIMEOUT_S) == 0:
            self.result = combine(self.slots)
        self.barrier.wait(_MEETING_TIMEOUT_S)
        return self.result


class VirtualWire(ReplicaWire):
    """The replica group of replica `index`, inside one process; charged to the ledger like the real one."""

    def __init__(self, room: MeetingRoom, index: int) -> None:
        super().__init__()
        self.room, self.index = room, index
        self.size = self.replicas = room.barrier.parties

    def _all_reduce(self, tensor: Tensor, operation: Any) -> None:
        combine = _summed if operation == dist.ReduceOp.SUM else _largest
        tensor.copy_(self.room.exchange(self.index, tensor, combine))

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        tensor.copy_(self.room.exchange(self.index, tensor, lambda all_: all_[source].clone()))

    def _all_gather(self, row: Tensor) -> Tensor:
        return self.room.exchange(self.index, row, torch.stack).clone()

    def _all_to_all(self, outgoing: Tensor, leaving: Sequence[int], arriving: Sequence[int]) -> Tensor:
        pieces = outgoing.split(list(leaving))
        incoming: Tensor = self.room.exchange(self.index, pieces, _delivered)[self.index]
        assert len(incoming) == sum(arriving), "the replicas expect messages of other lengths than were sent"
        return incoming


def _delivered(sent: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """For each replica what all sent it, one message after the other; `sent[m]` are the messages of replica m."""
    return [torch.cat(messages) for messages in zip(*sent, strict=True)]


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).amax(0)


def _summed(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


class Replicas:
    """The optimizers of all replicas, stepped together.

    Args:
        named: each replica's named parameters; the first fact given for a name holds for all.
        facts: what the model says of each parameter.
        settings: the JSON block.
    """

    def __init__(
        self,
        named: Sequence[Sequence[tuple[str, torch.nn.Parameter]]],
        facts: dict[str, ParameterFacts],
        settings: dict[str, Any],
    ) -> None:
        room = MeetingRoom(len(named))
        self._room = room
        self._threads = ThreadPoolExecutor(len(named))
        self.optimizers = [LoRDO(parameters, **settings) for parameters in named]
        for optimizer in self.optimizers:
            optimizer.managed = True  # step() alone then never meets the other replicas; end_attempt() does
        self._together(lambda m: self._attach(m, named[m], facts))

    def _attach(self, m: int, parameters: Sequence[tuple[str, torch.nn.Parameter]], facts: Any) -> None:
        flats = [FlatTensor.of_one(p, facts[name]) for name, p in parameters]
        device = flats[0].tensor.device
        self.optimizers[m].attach(flats, VirtualWire(self._room, m), InsideReplica(device=device))

    def _together(self, run: Callable[[int], Any]) -> list[Any]:
        """`run(m)` on every replica at once. Raises what the first failing replica raised."""
        if len(self.optimizers) == 1:
            return [run(0)]
        futures = [self._threads.submit(self._or_break, run, m) for m in range(len(self.optimizers))]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]

    def _or_break(self, run: Callable[[int], Any], m: int) -> Any:
        try:
            return run(m)
        except BaseException:
            self._room.barrier.abort()  # the others must not wait for a replica that will not come
            raise

    def step(self, lr: float) -> None:
        """One attempted step of every replica from the gradients in `.grad`, and the sync that it ends in."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self._together(lambda m: self.optimizers[m].end_attempt())

    def finish(self) -> None:
        """Sync unless the last step ended in one: all replicas then hold the same weights."""
        self._together(lambda m: self.optimizers[m].final_sync())

    def close(self) -> None:
        self._threads.shutdown()

    @property
    def first(self) -> LoRDO:
        """Replica 0, whose reports stand for everybody's."""
        return self.optimizers[0]

    @property
    def syncs(self) -> list[OuterSync]:
        """The outer sync of every replica, with its ledger and its state."""
        found = [optimizer.sync for optimizer in self.optimizers if optimizer.sync is not None]
        assert len(found) == len(self.optimizers)
        return found
