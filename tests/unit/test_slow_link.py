"""A link that is imitated takes as long as the real one would, and no bit travels otherwise for it."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lordo_ds.comm import comm, slow_link
from lordo_ds.comm.comm import Comm
from lordo_ds.comm.slow_link import SlowLink
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.sync.throttle import throttle, warn_of_throttle


def config(**settings: object) -> LordoConfig:
    return LordoConfig.parse(settings)


def test_a_collective_takes_its_bits_and_the_latency_of_its_hops() -> None:
    link = SlowLink(mbit_per_s=8.0, latency_ms=3.0)
    assert link.seconds(2_000_000, hops=0) == 2.0  # 16 million bits
    assert link.seconds(0, hops=4) == pytest.approx(0.012)
    assert link.seconds(500_000, hops=2) == pytest.approx(0.506)
    assert SlowLink(100.0).seconds(0, hops=10) == 0.0


def test_collectives_at_once_share_the_link_and_overlap_their_latencies() -> None:
    link = SlowLink(8.0, latency_ms=100.0)
    assert link.over_at(50.0, 1_000_000, hops=1) == pytest.approx(51.1)
    assert link.over_at(50.0, 1_000_000, hops=2) == pytest.approx(52.2), "it transmits when the first has"
    assert link.over_at(60.0, 1_000_000, hops=0) == pytest.approx(61.0), "and a free link waits for nobody"


class Clock:
    """In the place of `time`: nothing takes any time but sleeping."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (comm, slow_link):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_only_what_is_left_is_slept(clock: Clock) -> None:
    link = SlowLink(8.0)
    link.wait(clock.now - 60.0, 1_000_000, hops=1)
    assert clock.now == 1000.0, "the real one took longer"
    link.wait(clock.now - 0.75, 1_000_000, hops=0)
    assert clock.now == 1000.25


def test_threads_that_send_at_once_take_as_long_as_one_after_another() -> None:
    link, began = SlowLink(8.0), time.perf_counter()
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: link.wait(began, 100_000, 0), range(3)))
    assert time.perf_counter() - began >= 0.3


class TwoReplicas(ReplicaWire):
    """Of which the other does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.size = self.replicas = 2

    def _all_reduce(self, tensor: torch.Tensor, operation: object) -> None:
        pass

    def _broadcast(self, tensor: torch.Tensor, source: int) -> None:
        pass

    def _all_gather(self, row: torch.Tensor) -> torch.Tensor:
        return torch.stack([row, row])


SENDS = {  # of 10,000 bytes: what they send, and the time that the link of rank 0 and of rank 1 takes
    "sum": (lambda wire, row: wire.sum_(row, "x"), (10_000, 10_000), 0.08 + 2 * 0.02),
    "max": (lambda wire, row: wire.max_(row, "x"), (10_000, 10_000), 0.08 + 2 * 0.02),
    "gather": (lambda wire, row: wire.gather(row, "x"), (10_000, 10_000), 0.08 + 0.02),
    "broadcast": (lambda wire, row: wire.broadcast_(row, "x"), (10_000, 0), 0.08 + 0.02),
}


@pytest.mark.parametrize("name", SENDS)
@pytest.mark.parametrize("index", [0, 1])
def test_every_collective_is_held_back_by_what_it_sends(clock: Clock, name: str, index: int) -> None:
    send, sent, seconds = SENDS[name]
    free, held = TwoReplicas(), TwoReplicas()
    free.index = held.index = index
    held.slow_link = SlowLink(mbit_per_s=1.0, latency_ms=20.0)
    for wire in (free, held):
        send(wire, torch.zeros(2500))
        assert wire.ledger.total_bytes == sent[index]
    assert free.ledger.total_seconds == 0.0 and held.ledger.total_seconds == pytest.approx(seconds)


class Failing(TwoReplicas):
    def _all_reduce(self, tensor: torch.Tensor, operation: object) -> None:
        raise RuntimeError("connection reset")


def test_a_collective_that_fails_is_not_counted_and_not_held_back(clock: Clock) -> None:
    wire = Failing()
    wire.slow_link = SlowLink(1e-6)
    with pytest.raises(RuntimeError, match="connection reset"):
        wire.sum_(torch.zeros(10), "x")
    assert clock.now == 1000.0 and not wire.ledger.by_kind and not wire.ledger.seconds_by_kind


def test_the_settings_hold_back_the_wire_and_nothing_without_them_does() -> None:
    wire = ReplicaWire()
    throttle(config(), wire)
    assert wire.slow_link is None and Comm().slow_link is None and wire.twins.slow_link is None
    throttle(config(wire_throttle={"mbit_per_s": 20, "latency_ms": 5}), wire)
    link = wire.slow_link
    assert link is not None and (link.mbit_per_s, link.latency_ms) == (20.0, 5.0) and wire.twins.slow_link is None
    throttle(config(wire_throttle={"mbit_per_s": 20, "latency_ms": 5}), wire)
    assert wire.slow_link is link, "one wire has one link, whoever asks for it"


def test_the_log_says_that_a_wire_is_held_back_and_what_a_sync_then_takes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lordo_ds")
    slow = config(wire_throttle={"mbit_per_s": 8}, sync_timeout_s=10)
    wire = ReplicaWire()
    warn_of_throttle(slow, wire, 10**9)
    assert not caplog.messages
    throttle(slow, wire)
    warn_of_throttle(slow, wire, 9_000_000)
    (said,) = caplog.messages
    assert "optimizer.params.wire_throttle holds back what replica 0 sends" in said
    assert "8 Mbit/s and 0 ms" in said and "measurements only" in said
    caplog.clear()
    warn_of_throttle(slow, wire, 11_000_000)
    assert "a sync takes more than 11 s, and optimizer.params.sync_timeout_s = 10: give it more" in caplog.messages[1]
