"""A slow link between replicas, imitated where there is none: to measure what a real one would cost."""

from __future__ import annotations

import threading
import time

from lordo_ds.config import WireThrottle


class SlowLink:
    """The link of one rank to those of the other replicas, of a given rate and latency, imitated by sleeping.

    A collective that begins at time t is over no sooner than

        max(t, end of the transmission before) + 8 * bytes / rate + hops * latency

    and when it really is, if that is later. `bytes` is what this rank sends, as the ledger counts it; of a broadcast,
    on every rank, what its source sends. `hops` are the messages that wait for one another: 2 (M-1) in a ring's
    reduction over M replicas, M-1 in its gather, 1 where all of a rank's messages leave at once (broadcast,
    all-to-all).

    Every rank has such a link to itself and sends and receives at its full rate at once: where several ranks share a
    machine's link, give each of them its part of the rate. Collectives that run at once, each in a thread of its own,
    share the link: they transmit one after another, and their latencies overlap.
    """

    def __init__(self, mbit_per_s: float, latency_ms: float = 0.0) -> None:
        self.mbit_per_s, self.latency_ms = mbit_per_s, latency_ms
        self._lock = threading.Lock()
        self._free_at = 0.0  # by `time.perf_counter`

    @classmethod
    def of(cls, throttle: WireThrottle | None) -> SlowLink | None:
        return None if throttle is None else cls(throttle.mbit_per_s, throttle.latency_ms)

    def seconds(self, sent_bytes: int, hops: int) -> float:
        """That a collective takes when the link is free."""
        return sent_bytes * 8 / (self.mbit_per_s * 1e6) + hops * self.latency_ms / 1e3

    def over_at(self, began: float, sent_bytes: int, hops: int) -> float:
        """When a collective that began then is over, by `time.perf_counter`; its transmission occupies the link."""
        with self._lock:
            self._free_at = max(began, self._free_at) + self.seconds(sent_bytes, 0)
            return self._free_at + self.seconds(0, hops)

    def wait(self, began: float, sent_bytes: int, hops: int) -> None:
        """Sleep until a collective that began then, and has really ended, is over."""
        over = self.over_at(began, sent_bytes, hops)
        while (rest := over - time.perf_counter()) > 0:
            time.sleep(rest)
