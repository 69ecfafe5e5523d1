"""How long a run's communication takes on a given link: collectives, a sync, a step; from plain numbers.

Each collective takes hops x latency + bytes / bandwidth, the alpha-beta model; the bytes are those of `lordo_ds.costs`.
What a sync computes is no function of the link and is measured: `launchers/bench_network.py` does, and prints how far
these times are from those that it measures (of the bandwidth only: the links that it makes have next to no latency).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Of a packet of 1514 bytes, Ethernet's header among them, IPv4 and TCP with timestamps leave 1448 to the message.
TCP_HEADERS = 1514 / 1448


@dataclass(frozen=True)
class Link:
    """What joins a replica to the others: as fast in both directions at once, and shared by all that it sends.

    `bytes_per_s` is the bandwidth, inf for none that matters; `latency_s` one way, of the smallest message;
    `wire_bytes` what is on the wire for each byte of a long message.
    """

    bytes_per_s: float = math.inf
    latency_s: float = 0.0
    wire_bytes: float = TCP_HEADERS

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0:
            raise ValueError(f"bytes_per_s {self.bytes_per_s:g}: must be above 0")
        if not 0 <= self.latency_s < math.inf:
            raise ValueError(f"latency_s {self.latency_s:g}: must be at least 0, and finite")
        if not 1 <= self.wire_bytes < math.inf:
            raise ValueError(f"wire_bytes {self.wire_bytes:g}: must be at least 1, and finite")

    @classmethod
    def of_mbit(cls, mbit_per_s: float, latency_ms: float = 0.0) -> Link:
        """A link of so many 10^6 bits per second."""
        return cls(mbit_per_s * 1e6 / 8, latency_ms / 1e3)

    def seconds(self, sent_bytes: float, hops: int = 0) -> float:
        """Of collectives in which a rank sends `sent_bytes`, with that many messages one after the other."""
        return hops * self.latency_s + sent_bytes * self.wire_bytes / self.bytes_per_s


def reduction_hops(replicas: int) -> int:
    """Messages one after the other in a ring's all-reduce: around it once to sum, once to tell."""
    return 2 * (replicas - 1)


def gather_hops(replicas: int) -> int:
    """Messages one after the other in a ring's all-gather."""
    return replicas - 1


@dataclass(frozen=True)
class Sync:
    """What one sync costs a rank: seconds that it computes, bytes that it sends, messages that wait for each other.

    With `parts` above 1 so many fragments of the model leave at steps of their own, each with an equal share of these.
    """

    work_s: float
    sent_bytes: float
    hops: int = 0
    parts: int = 1

    def seconds(self, link: Link, overlapped_s: float = 0.0) -> float:
        """That it holds up training, which goes on for `overlapped_s` while a part is on its way."""
        on_the_way_s = link.seconds(self.sent_bytes, self.hops) / self.parts
        return self.work_s + self.parts * max(0.0, on_the_way_s - overlapped_s)


def step_seconds(compute_s: float, sync: Sync, interval: int, link: Link, delay_steps: int = 0) -> float:
    """Mean seconds of a step, in a run that syncs everything once in `interval` steps.

    Args:
        compute_s: of a step without a sync.
        delay_steps: steps between a part's departure and its application; 0 waits for it.

    Raises:
        ValueError: a part would be on its way when the next one leaves.
    """
    if not (interval >= 1 and 0 <= delay_steps * sync.parts <= interval):
        raise ValueError(
            f"interval {interval}, delay_steps {delay_steps}, parts {sync.parts}: must be 1 <= interval and "
            "0 <= delay_steps x parts <= interval"
        )
    return compute_s + sync.seconds(link, delay_steps * compute_s) / interval
