"""Counts what this rank hands to torch.distributed, and which of it leaves the replica.

The counter sits on the methods of `ProcessGroup`, below `torch.distributed.all_reduce` and the like: every
Python collective ends there, so calls through `deepspeed.comm` are seen too, even those that DeepSpeed makes
through function objects it captured when its backend was built (`all_gather_into_tensor` and
`reduce_scatter_tensor` in 0.19.8), and those of code that did `from torch.distributed import all_reduce`.
Object collectives appear under their own name, as the size and the payload messages they consist of.

Not seen: collectives issued from C++ (torch's own DistributedDataParallel, functional collectives, DTensor)
and store traffic. Nothing in this project uses the former for training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Method of ProcessGroup -> (the name users know, position of the local input among the arguments).
# torch renamed three of them after 2.10 (`_allgather_base` -> `all_gather_single`, ...): both are listed.
_METHODS: dict[str, tuple[str, int]] = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce_coalesced", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "allgather": ("all_gather", 1),
    "allgather_coalesced": ("all_gather_coalesced", 1),
    "_allgather_base": ("all_gather_into_tensor", 1),
    "all_gather_single": ("all_gather_into_tensor", 1),
    "allgather_into_tensor_coalesced": ("all_gather_into_tensor", 1),
    "all_gather_single_coalesced": ("all_gather_into_tensor", 1),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter_tensor", 1),
    "reduce_scatter_single": ("reduce_scatter_tensor", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter_tensor", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter_tensor", 1),
    "gather": ("gather", 1),
    "scatter": ("scatter", 1),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all_single", 1),
    "all_to_all_single": ("all_to_all_single", 1),
    "send": ("send", 0),
    "recv": ("recv", 0),
    "recv_anysource": ("recv", 0),
    "barrier": ("barrier", -1),
    "monitored_barrier": ("monitored_barrier", -1),
}
_PEER_METHODS = ("send", "recv")
_C10D_FILE = dist.distributed_c10d.__file__
_PLUMBING = ("torch/distributed/", "deepspeed/comm/", "tests/collectives.py", "typing_extensions.py")

ReplicaOfRank = Mapping[int, int] | Sequence[int] | Callable[[int], int]


@dataclass(frozen=True)
class Record:
    """One message of this rank.

    `ranks` are global and sorted: the group's, or the two ends of a send or recv. `payload_bytes` is the
    local input (for a recv, a broadcast or a scatter on other ranks than the source: the local buffer), not
    what the algorithm puts on the wire. `where` is the caller: file, line and function outside torch and
    `deepspeed.comm`. `kept_bytes` are the part of an all-to-all's input that is this rank's own.
    """

    op: str
    ranks: tuple[int, ...]
    payload_bytes: int
    phase: str
    where: str
    kept_bytes: int = 0


class CollectiveCounter:
    """Records every collective of this process while it is entered.

    Example, inside a rank:
        with CollectiveCounter() as counter:
            counter.phase("inner")
            train_one_step()
        assert counter.crossing([0, 0, 1, 1]) == []

    Counters nest; leaving one restores what it replaced.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._phase = ""
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> CollectiveCounter:
        assert not self._originals, "this counter is already entered"
        for method, (op, position) in _METHODS.items():
            original = dist.ProcessGroup.__dict__.get(method)
            if original is not None:
                self._originals[method] = original
                setattr(dist.ProcessGroup, method, self._recording(original, method, op, position))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for method, original in self._originals.items():
            setattr(dist.ProcessGroup, method, original)
        self._originals = {}

    def phase(self, name: str) -> None:
        """Labels the records from here on."""
        self._phase = name

    @contextmanager
    def in_phase(self, name: str) -> Iterator[None]:
        """Labels the records of a block, then returns to the label before it."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def select(self, op: str | None = None, phase: str | None = None) -> list[Record]:
        """The records of one op, one phase, or both."""
        return [r for r in self.records if op in (None, r.op) and phase in (None, r.phase)]

    def crossing(self, replica_of_rank: ReplicaOfRank, phase: str | None = None) -> list[Record]:
        """The records whose ranks belong to more than one replica; barriers, of zero bytes, included."""
        replica_of = replica_of_rank if callable(replica_of_rank) else replica_of_rank.__getitem__
        return [r for r in self.select(phase=phase) if len({replica_of(rank) for rank in r.ranks}) > 1]

    def crossing_bytes(self, replica_of_rank: ReplicaOfRank, phase: str | None = None) -> int:
        """Payload bytes of the crossing records."""
        return sum(r.payload_bytes for r in self.crossing(replica_of_rank, phase))

    def _recording(self, original: Any, method: str, op: str, position: int) -> Callable[..., Any]:
        def recorded(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            values = (*args, *kwargs.values())
            payload_bytes = 0 if position < 0 else _nbytes(values[position])
            if op == "scatter" and payload_bytes == 0:
                payload_bytes = _nbytes(values[0])
            ranks = dist.get_process_group_ranks(group)
            if method in _PEER_METHODS:
                ranks = [dist.get_rank(), dist.get_global_rank(group, values[1])]
            public_op, where = _caller(op)
            kept_bytes = 0
            if op == "all_to_all_single":  # of flat tensors
                kept_bytes = payload_bytes // len(ranks)  # equal shares, where none are given
                if len(values) > 3 and values[3]:
                    kept_bytes = values[3][dist.get_rank(group)] * values[1].element_size()
            known = tuple(sorted(set(ranks))), payload_bytes, self._phase, where, kept_bytes
            self.records.append(Record(public_op, *known))
            return original(group, *args, **kwargs)

        return recorded


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Iterable):
        return sum(_nbytes(item) for item in value)
    return 0


def _caller(op: str) -> tuple[str, str]:
    """(public name of the running collective, where it was called from), read off the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        filename = frame.f_code.co_filename
        name = frame.f_code.co_name
        if filename == _C10D_FILE and name in dist.distributed_c10d.__all__ and name != "batch_isend_irecv":
            op = name
        if not any(part in filename for part in _PLUMBING):
            return op, f"{filename}:{frame.f_lineno} {name}"
        frame = frame.f_back
    return op, "?"
