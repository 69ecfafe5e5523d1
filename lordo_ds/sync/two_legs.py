"""A mean over replicas in two legs: all send each owner what is its to add up, and it tells all what came of it.

An all-reduce is just that. Here the messages may be in fewer bits (`lordo_ds.core.codec`), and nothing is lost for
good: what a message leaves out is kept by its sender and added to the next one, on both legs. All replicas, the owner
too, go on from what the second message says, so that they are equal bit by bit on whatever hardware.

The errors are in the state of each parameter: `wire_error` is what this replica's D has not been told of yet, one value
per element; `owner_error` what the replicas have not been told of the means, of the elements that this one owns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.core.codec import Codec
from lordo_ds.core.ownership import Segment, numel_of
from lordo_ds.replica.fragment import Fragment

Owned = Sequence[Sequence[Segment]]


class TwoLegs:
    """Between the replicas, for the parameters of one bucket at a time; each rank with those that hold the same part.

    `owned` are the segments of every replica, see `lordo_ds.core.ownership`.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def mean_(
        self,
        items: Sequence[Fragment],
        parts: Sequence[Tensor],
        owned: Owned,
        participants: Sequence[int],
        wire: ReplicaWire,
        kind: str,
    ) -> None:
        """Replace this replica's D by the mean over the participants, as far as the messages say it. Collective.

        Args:
            parts: D of each item, (numel,); not looked at where this replica does not take part.
        """
        mine = owned[wire.index]
        mean = self.to_owner(items, parts, owned, participants, wire, kind)
        self._add_errors_(mean, items, mine, "owner_error")
        message = self.codec.encode_(mean)
        self._keep_errors(mean, items, mine, "owner_error")
        width = parts[0].element_size()
        lengths = [self.codec.message_bytes(numel_of(segments), width) for segments in owned]
        for segments, told in zip(owned, wire.spread(message, lengths, kind), strict=True):
            decoded = self.codec.decode(told, numel_of(segments), like=mean)
            for segment, values in _split(decoded, segments):
                parts[segment.item][segment.start : segment.stop] = values

    def to_owner(
        self,
        items: Sequence[Fragment],
        parts: Sequence[Tensor],
        owned: Owned,
        participants: Sequence[int],
        wire: ReplicaWire,
        kind: str,
    ) -> Tensor:
        """The first leg: the mean of what this replica owns, its segments one after the other. Collective."""
        like, width = parts[0], parts[0].element_size()
        messages = []
        for segments in owned:
            if wire.index not in participants:
                length = self.codec.message_bytes(numel_of(segments), width)
                messages.append(torch.zeros(length, dtype=torch.uint8, device=like.device))
                continue
            values = torch.cat([like.new_empty(0), *(parts[s.item][s.start : s.stop] for s in segments)])
            self._add_errors_(values, items, segments, "wire_error")
            messages.append(self.codec.encode_(values))
            self._keep_errors(values, items, segments, "wire_error")
        numel = numel_of(owned[wire.index])
        arriving = [self.codec.message_bytes(numel, width)] * wire.replicas
        told = wire.swap(messages, arriving, kind)
        mean = like.new_zeros(numel)
        for m in participants:  # always in this order
            mean += self.codec.decode(told[m].to(like.device), numel, like=like)
        return mean.div_(len(participants))

    def _add_errors_(self, values: Tensor, items: Sequence[Fragment], segments: Sequence[Segment], name: str) -> None:
        for segment, part in _split(values, segments) if self.codec.lossy else ():
            part.add_(_kept(items[segment.item], segment, name).to(part.device, non_blocking=True))

    def _keep_errors(self, values: Tensor, items: Sequence[Fragment], segments: Sequence[Segment], name: str) -> None:
        for segment, part in _split(values, segments) if self.codec.lossy else ():
            _kept(items[segment.item], segment, name).copy_(part)


def _split(values: Tensor, segments: Sequence[Segment]) -> list[tuple[Segment, Tensor]]:
    return list(zip(segments, values.split([segment.numel for segment in segments]), strict=True))


def _kept(item: Fragment, segment: Segment, name: str) -> Tensor:
    """The errors of a segment, a view of the state."""
    kept: Tensor = item.state[name]
    return kept if name == "owner_error" else kept[segment.start : segment.stop]
