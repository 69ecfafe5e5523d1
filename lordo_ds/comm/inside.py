"""The groups inside a replica, counted apart from the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lordo_ds.comm.comm import Comm

_T = TypeVar("_T")


class InsideComm(Comm):
    """One group of ranks inside a replica."""

    def scatter_sum(self, rows: Tensor, kind: str) -> Tensor:
        """Row i of (ranks, n), summed over ranks, for rank i: (n,)."""
        if self.size == 1 or not rows.numel():
            return rows[0]
        device = self._device(rows)
        sent_bytes = rows.numel() * rows.element_size() * (self.size - 1) // self.size
        with self._sending(kind, sent_bytes, hops=self.size - 1):
            mine = torch.empty_like(rows[0], device=device)
            dist.reduce_scatter_tensor(mine, rows.to(device).contiguous().view(-1), group=self.group)
            return mine.to(rows.device)

    def exchange(
        self, parts: Sequence[Sequence[Tensor]], arriving: Sequence[Sequence[int]], like: Tensor, kind: str
    ) -> list[list[Tensor]]:
        """`parts[i]`, flat tensors, to rank i; what each rank sent here, in flat tensors of the lengths `arriving[i]`.

        Args:
            like: of the dtype and device of all of them.
        """
        assert self.size > 1
        leaving = [sum(part.numel() for part in to_rank) for to_rank in parts]
        expected = [sum(lengths) for lengths in arriving]
        device = self._device(like)
        outgoing = torch.cat([like.new_empty(0), *(part for to_rank in parts for part in to_rank)])
        with self._sending(kind, (sum(leaving) - leaving[self.index]) * like.element_size()):
            incoming = like.new_empty(sum(expected), device=device)
            dist.all_to_all_single(incoming, outgoing.to(device), expected, leaving, group=self.group)
            pieces = incoming.to(like.device).split(expected)
        return [list(piece.split(list(lengths))) for piece, lengths in zip(pieces, arriving, strict=True)]


@dataclass(frozen=True)
class InsideReplica:
    """The groups of this rank inside its replica.

    `shard` are the ranks that ZeRO cuts parameters over, `tensor` those that hold slices of the same matrices,
    `everyone` all ranks of all pipeline stages. `rows` are those whose data differ: at stage 0 they hold whole
    parameters and are no shards.
    """

    shard: InsideComm = field(default_factory=InsideComm)
    tensor: InsideComm = field(default_factory=InsideComm)
    everyone: InsideComm = field(default_factory=InsideComm)
    rows: InsideComm = field(default_factory=InsideComm)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def any_rank(self, flag: bool) -> bool:
        """Whether it holds on any rank of the replica. Collective over all of them."""
        if self.everyone.size == 1:
            return flag
        return bool(self.everyone.max_(torch.tensor([float(flag)], device=self.device), "flags")[0])

    def of_every_rank(self, values: Sequence[_T]) -> list[_T]:
        """What the ranks of the replica list, one after the other. Collective over all of them."""
        if self.everyone.size == 1:
            return list(values)
        lists: list[list[_T]] = [[]] * self.everyone.size
        dist.all_gather_object(lists, list(values), group=self.everyone.group)
        return [value for one in lists for value in one]

    def vector(self, values: list[int]) -> Tensor:
        """Integers, ready to be sent."""
        return torch.tensor(values, dtype=torch.int64, device=self.device)
