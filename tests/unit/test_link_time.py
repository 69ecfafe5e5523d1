"""Times of collectives, syncs and steps on a link, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from lordo_ds.link_time import Link, Sync, gather_hops, reduction_hops, step_seconds


def test_a_collective_takes_its_hops_and_its_bytes() -> None:
    link = Link(bytes_per_s=1000.0, latency_s=0.5, wire_bytes=1.25)
    assert link.seconds(800, hops=3) == 3 * 0.5 + 800 * 1.25 / 1000
    assert Link().seconds(10**12) == 0.0
    slow = Link.of_mbit(8.0, latency_ms=20.0)
    assert slow.seconds(1448, hops=1) == pytest.approx(0.02 + 1514e-6)


@pytest.mark.parametrize(("replicas", "reduction", "gather"), [(1, 0, 0), (2, 2, 1), (4, 6, 3)])
def test_hops_of_a_ring(replicas: int, reduction: int, gather: int) -> None:
    assert (reduction_hops(replicas), gather_hops(replicas)) == (reduction, gather)


def test_a_sync_holds_training_up_for_what_training_does_not_cover() -> None:
    link = Link(bytes_per_s=100.0, wire_bytes=1.0)
    sync = Sync(work_s=0.25, sent_bytes=400)
    assert sync.seconds(link) == 0.25 + 4.0
    assert sync.seconds(link, overlapped_s=3.0) == 0.25 + 1.0
    assert sync.seconds(link, overlapped_s=5.0) == 0.25, "it never gives time back"
    assert step_seconds(1.0, sync, 8, link) == 1.0 + 4.25 / 8
    assert step_seconds(1.0, sync, 8, link, delay_steps=3) == 1.0 + 1.25 / 8


def test_each_part_of_a_sync_is_covered_on_its_own() -> None:
    link = Link(bytes_per_s=100.0, latency_s=0.5, wire_bytes=1.0)
    sync = Sync(work_s=0.25, sent_bytes=400, hops=4, parts=2)  # 3 s on the way for each part
    assert sync.seconds(link) == 0.25 + 6.0
    assert step_seconds(1.0, sync, 8, link, delay_steps=2) == 1.0 + (0.25 + 2 * 1.0) / 8
    assert step_seconds(1.0, sync, 8, link, delay_steps=4) == 1.0 + 0.25 / 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Link(0.0), "bytes_per_s 0: must be above 0"),
        (lambda: Link(math.nan), "bytes_per_s nan: must be above 0"),
        (lambda: Link(1.0, -1.0), "latency_s -1: must be at least 0"),
        (lambda: Link(1.0, 0.0, 0.5), "wire_bytes 0.5: must be at least 1"),
        (lambda: step_seconds(1.0, Sync(0.0, 0.0), 4, Link(), delay_steps=5), "interval 4, delay_steps 5"),
        (lambda: step_seconds(1.0, Sync(0.0, 0.0, parts=2), 4, Link(), delay_steps=3), "delay_steps 3, parts 2"),
        (lambda: step_seconds(1.0, Sync(0.0, 0.0), 0, Link()), "interval 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
