"""Which replica owns which elements: it sums what all send it of them, and tells all of them what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of a rank's part of a parameter; `item` is the parameter's place in the bucket."""

    item: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


def shared_out(numels: Sequence[int], owners: int, block: int) -> list[list[Segment]]:
    """The segments of every owner: about equal runs of whole blocks, through all parameters one after the other.

    Every element is in exactly one of them, and of one parameter an owner has at most one. With few elements the last
    owners have none.

    Args:
        numels: elements of each parameter.
        block: elements that a codec gives a common scale.
    """
    share = -(-sum(numels) // (owners * block)) * block
    found: list[list[Segment]] = [[] for _ in range(owners)]
    before = 0
    for item, numel in enumerate(numels):
        start = 0
        while start < numel:
            owner = (before + start) // share
            stop = min(numel, (owner + 1) * share - before)
            found[owner].append(Segment(item, start, stop))
            start = stop
        before += numel
    return found


def numel_of(segments: Sequence[Segment]) -> int:
    return sum(segment.numel for segment in segments)
