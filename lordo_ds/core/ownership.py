"""Which replica owns which elements: it sums what all send it of them, and tells all of them what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lordo_ds.config import LordoConfig


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of a rank's part of a parameter; `item` is the parameter's place in the bucket."""

    item: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


def at_owners(config: LordoConfig, replicas: int, changing: bool = False) -> bool:
    """Whether each matrix's outer step, and the refresh of its basis, run on one replica, its owner, or on all.

    Owners divide the work, and the outer momentum, by the number of replicas, and send the bases: at 1/8 of the smaller
    side in fp32 a twentieth more bytes, and a quarter more on an int8 wire. By itself only orthogonalizing is work
    enough, on a wire of 16 bits or more; of two replicas each would still do half of it; where replicas come and go the
    momentum of those that go would be lost.

    Args:
        changing: replicas come and go.
    """
    if replicas == 1 and not changing:
        return False
    if config.outer.compute != "auto":
        return config.outer.compute == "owner"
    shared = config.projection == "global" and config.basis_source != "gradient"
    wide = config.pseudo_gradient_dtype in ("fp32", "bf16")
    return shared and wide and config.outer.orthogonalize and replicas > 2 and not changing


def owned_segments(
    held: Sequence[Sequence[int]], whole: Sequence[bool], owners: int, block: int, shard: int = 0
) -> list[list[Segment]]:
    """`by_matrix` where some parameters are to be kept whole, else `shared_out` on this shard."""
    if any(whole):
        return by_matrix(held, whole, owners, shard)
    return shared_out([lengths[shard] for lengths in held], owners, block)


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


def by_matrix(held: Sequence[Sequence[int]], whole: Sequence[bool], owners: int, shard: int = 0) -> list[list[Segment]]:
    """The segments of every owner, where one owner has all of a matrix, on all shards of its replica.

    Largest first, a matrix goes to whoever has least on the shards that hold it. The other parameters fill up what is
    missing to equal shares of this shard; of one of them an owner has at most one segment. Of a matrix that this shard
    holds nothing of, its owner has an empty segment: the shards work on it together.

    Args:
        held: elements of each parameter on every shard.
        whole: whether the parameter is a matrix to be kept whole.
    """
    shards = len(held[0]) if held else 1
    loads = [[0] * shards for _ in range(owners)]
    found: list[list[Segment]] = [[] for _ in range(owners)]
    matrices = [i for i, kept_whole in enumerate(whole) if kept_whole]
    for i in sorted(matrices, key=lambda i: (-sum(held[i]), i)):
        on = [s for s in range(shards) if held[i][s]]
        owner = min(range(owners), key=lambda o: (max((loads[o][s] for s in on), default=0), sum(loads[o]), o))
        for s in on:
            loads[owner][s] += held[i][s]
        found[owner].append(Segment(i, 0, held[i][shard]))
    share = -(-sum(lengths[shard] for lengths in held) // owners)
    room = [max(0, share - load[shard]) for load in loads]
    owner = 0
    for i, kept_whole in enumerate(whole):
        start, numel = 0, held[i][shard]
        while not kept_whole and start < numel:
            while not room[owner]:
                owner += 1
            stop = min(numel, start + room[owner])
            found[owner].append(Segment(i, start, stop))
            room[owner] -= stop - start
            start = stop
    return [sorted(segments, key=lambda one: one.item) for segments in found]


def numel_of(segments: Sequence[Segment]) -> int:
    return sum(segment.numel for segment in segments)
