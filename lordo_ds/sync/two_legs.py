"""Sums over replicas in two legs: all send each owner what is its to add up, and it tells all what came of it.

An all-reduce is just that. Here the messages may be in fewer bits (`lordo_ds.core.codec`), and nothing is lost for
good: what a message leaves out is kept by its sender and added to the next one, on both legs. All replicas, the owner
too, go on from what the second message says, so that they are equal bit by bit on whatever hardware.

The errors are in the state of each parameter: `wire_error` is what this replica's D has not been told of yet, one value
per element; `owner_error` what the owner has not told the replicas yet, of the elements that this one owns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.core.codec import Codec
from lordo_ds.core.ownership import Segment, numel_of
from lordo_ds.replica.fragment import Fragment

Owned = Sequence[Sequence[Segment]]


class TwoLegs:
    """Between the replicas, for some vectors at a time; each rank with those that hold the same part.

    Of both legs, `parts` are the vectors of this replica, `owned` the segments of every replica in them, and `items`
    the parameters that keep the errors of a lossy codec, one for each vector.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def to_owners(
        self,
        parts: Sequence[Tensor],
        owned: Owned,
        participants: Sequence[int],
        wire: ReplicaWire,
        kind: str,
        items: Sequence[Fragment] = (),
        look_at: Callable[[Tensor], None] = lambda said: None,
    ) -> Tensor:
        """The sum over the participants of what this replica owns, its segments one after the other. Collective.

        Args:
            parts: not looked at where this replica does not take part.
            look_at: called with what each participant says.
        """
        like, width = parts[0], parts[0].element_size()
        messages = []
        for segments in owned:
            if wire.index not in participants:
                length = self.codec.message_bytes(numel_of(segments), width)
                messages.append(torch.zeros(length, dtype=torch.uint8, device=like.device))
                continue
            values = torch.cat([like.new_empty(0), *(parts[s.item][s.start : s.stop] for s in segments)])
            messages.append(self._encoded(values, segments, items, "wire_error"))
        numel = numel_of(owned[wire.index])
        arriving = [self.codec.message_bytes(numel, width)] * wire.replicas
        told = wire.swap(messages, arriving, kind)
        total = like.new_zeros(numel)
        for m in participants:  # always in this order
            said = self.codec.decode(told[m], numel, like=like)
            look_at(said)
            total += said
        return total

    def to_all(
        self,
        values: Tensor,
        parts: Sequence[Tensor],
        owned: Owned,
        wire: ReplicaWire,
        kind: str,
        items: Sequence[Fragment] = (),
    ) -> None:
        """Fill all parts with what their owners tell, a lossy codec as far as the messages say it. Collective.

        Args:
            values: of what this replica owns, its segments one after the other; overwritten.
        """
        width = values.element_size()
        message = self._encoded(values, owned[wire.index], items, "owner_error")
        arriving = [self.codec.message_bytes(numel_of(segments), width) for segments in owned]
        for segments, told in zip(owned, wire.spread(message, arriving, kind), strict=True):
            decoded = self.codec.decode(told, numel_of(segments), like=values)
            for segment, one in split(decoded, segments):
                parts[segment.item][segment.start : segment.stop] = one

    def _encoded(self, values: Tensor, segments: Sequence[Segment], items: Sequence[Fragment], error: str) -> Tensor:
        """The message of values and of what earlier ones have not said; `values` is used up."""
        if not self.codec.lossy:
            return self.codec.encode_(values)
        pairs = [(_kept(items[segment.item], segment, error), part) for segment, part in split(values, segments)]
        for kept, part in pairs:
            part.add_(kept.to(part.device, non_blocking=True))
        message = self.codec.encode_(values)
        for kept, part in pairs:
            kept.copy_(part)
        return message


def split(values: Tensor, segments: Sequence[Segment]) -> list[tuple[Segment, Tensor]]:
    """Views of the segments' values, which lie one after the other."""
    return list(zip(segments, values.split([segment.numel for segment in segments]), strict=True))


def _kept(item: Fragment, segment: Segment, name: str) -> Tensor:
    """The errors of a segment, a view of the state."""
    kept: Tensor = item.state[name]
    return kept if name == "owner_error" else kept[segment.start : segment.stop]
