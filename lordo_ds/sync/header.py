"""What replicas tell each other around a sync: numbers side by side in an int64 vector, packed and read by name.

Of each message the dataclass is the table: its fields in the order of the wire, how many numbers each is, and which
travel as the bits of a float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lordo_ds.comm.comm import Comm
from lordo_ds.comm.inside import InsideReplica
from lordo_ds.sync.outliers import SIZES

_T = TypeVar("_T", bound="Told")


def sent_as(kind: type, count: int = 0) -> Any:
    """A field that is one number, or a tuple of `count` of them; floats travel as their bits."""
    return dataclasses.field(metadata={"kind": kind, "count": count})


@dataclass(frozen=True)
class Told:
    """What one rank tells the others of a group."""

    @classmethod
    def width(cls) -> int:
        """Numbers in the message."""
        return sum(field.metadata["count"] or 1 for field in dataclasses.fields(cls))

    def pack(self) -> list[int]:
        numbers: list[int] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values = list(value) if field.metadata["count"] else [value]
            assert len(values) == (field.metadata["count"] or 1), field.name
            numbers += bits_of(values) if field.metadata["kind"] is float else map(int, values)
        return numbers

    @classmethod
    def unpack(cls: type[_T], rows: Tensor) -> list[_T]:
        """One for each row of (ranks, `width` or more)."""
        numbers = rows[:, : cls.width()].cpu().contiguous()
        return [
            cls._of(integers, floats)
            for integers, floats in zip(numbers.tolist(), numbers.view(torch.float64).tolist(), strict=True)
        ]

    @classmethod
    def _of(cls: type[_T], integers: list[int], floats: list[float]) -> _T:
        found: dict[str, Any] = {}
        start = 0
        for field in dataclasses.fields(cls):
            kind, count = field.metadata["kind"], field.metadata["count"]
            stop = start + (count or 1)
            values = tuple(map(kind, (floats if kind is float else integers)[start:stop]))
            found[field.name] = values if count else values[0]
            start = stop
        return cls(**found)

    def exchange(
        self: _T, group: Comm, inside: InsideReplica, kind: str, more: Sequence[int] = ()
    ) -> tuple[list[_T], Tensor]:
        """Every rank's, in the order of the group; and what came with them, (ranks, len(more)). Collective."""
        rows = group.gather(inside.vector([*self.pack(), *more]), kind).cpu()
        return self.unpack(rows), rows[:, self.width() :]


def bits_of(values: Sequence[float]) -> list[int]:
    """Of float64, as integers that a vector of such can carry."""
    return torch.tensor(values, dtype=torch.float64).view(torch.int64).tolist()


@dataclass(frozen=True)
class RankCondition(Told):
    """What one rank says of itself inside its replica, before the replica speaks.

    `sizes` are in the order of `SIZES`; `groups` is a digest of the values of its parameter groups.
    """

    bad: bool = sent_as(bool)
    groups: int = sent_as(int)
    sizes: tuple[float, ...] = sent_as(float, len(SIZES))


@dataclass(frozen=True)
class Header(Told):
    """What every replica tells of itself before anything is averaged; t of every parameter comes with it.

    `rows` of `row_length` numbers wait to be averaged; `loaded` and `load_fault` are of `OutsideChanges`.
    """

    step: int = sent_as(int)
    rows: int = sent_as(int)
    row_length: int = sent_as(int)
    finite: bool = sent_as(bool)
    executed_steps: int = sent_as(int)
    executed_now: bool = sent_as(bool)
    basis_checksum: int = sent_as(int)
    groups: int = sent_as(int)
    loaded: int = sent_as(int)
    load_fault: int = sent_as(int)
    sizes: tuple[float, ...] = sent_as(float, len(SIZES))


@dataclass(frozen=True)
class Trailer(Told):
    """What every replica tells after a sync: a checksum of all that must be equal, and its part of the report."""

    checksum: int = sent_as(int)
    own_norm: float = sent_as(float)
    mean_norm: float = sent_as(float)
    overlaps: float = sent_as(float)
    refreshed: float = sent_as(float)
    inside_energy: float = sent_as(float)
    energy: float = sent_as(float)


@dataclass(frozen=True)
class FirstBasisFlags(Told):
    """What every replica tells before first bases are made; for each matrix comes whether its gradient is not zero."""

    step: int = sent_as(int)
    gives_gradient: bool = sent_as(bool)
    executed_before: int = sent_as(int)
    executed_now: bool = sent_as(bool)
