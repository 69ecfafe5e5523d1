"""Which ranks are blamed, and when, from what they have told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lordo_ds.dist.liveness import (
    LEFT,
    Patience,
    Peer,
    Process,
    Report,
    decode_process,
    decode_report,
    encode,
    why_it_ends,
)

HERE = Process("this host", 1, "0")
PATIENCE = Patience.of(10.0, before_first_step=False)


def peer(rank: int, silent_s: float = 0.0, **facts: object) -> Peer:
    return Peer(rank, Process("another host", 7, "0"), Report(beat=1, **facts), silent_s)  # type: ignore[arg-type]


def judged(me: Report, waited_s: float, *peers: Peer, patience: Patience = PATIENCE) -> str:
    return why_it_ends(me, waited_s, peers, HERE, patience)


def test_a_beat_that_does_not_change_is_silence_by_the_observers_clock() -> None:
    other = Peer(1)
    for elapsed, beat in ((0.0, None), (3.0, None), (2.0, 1), (4.0, 1), (1.0, 1)):
        other.hear(None if beat is None else Report(beat=beat), elapsed)
    assert other.silent_s == 5.0
    other.hear(Report(beat=2), 100.0)
    assert other.silent_s == 0.0


@pytest.mark.parametrize("inside", [True, False])
def test_silence_is_blamed_after_the_timeout_and_not_before(inside: bool) -> None:
    me = Report(step=5, inside=inside)
    assert not judged(me, 0.0, peer(1, 9.0, step=5), peer(2, step=5))
    reason = judged(me, 0.0, peer(1, 11.0, step=5), peer(2, step=5))
    assert "rank 1 has been silent for 11 s" in reason and "rank 2" not in reason


def test_the_ranks_that_the_others_wait_for_are_named_with_the_place_where_they_are() -> None:
    waiting = Report(step=6, inside=True)
    others = peer(1, step=6, inside=True), peer(2, step=4, place="train.py:8 (load)"), peer(3, step=6, inside=False)
    assert not judged(waiting, 9.0, *others)
    reason = judged(waiting, 11.0, *others)
    assert "waited 11 s at the end of step 6: rank 2 is past step 4 at train.py:8 (load)" in reason
    assert "rank 3" in reason and "rank 1" not in reason
    assert not judged(Report(step=6), 0.0, *others), "nobody waits outside the collectives"
    assert "rank 2 has been silent for 9 s" in judged(waiting, 11.0, peer(2, 9.0, step=4)), "as good as silent"


def test_waiting_for_the_first_step_is_no_fault_but_silence_is() -> None:
    first = Patience.of(10.0, before_first_step=True)
    assert not judged(Report(step=1, inside=True), 500.0, peer(1), patience=first)
    assert "rank 1 has been silent" in judged(Report(step=1, inside=True), 500.0, peer(1, 11.0), patience=first)


def test_when_all_wait_for_each_other_nobody_is_blamed() -> None:
    reason = judged(Report(step=6, inside=True), 11.0, peer(1, step=6, inside=True))
    assert reason == "all ranks have been among the collectives that end step 6 for 11 s"


def test_a_rank_that_left_in_order_is_blamed_only_by_those_who_wait_for_it() -> None:
    gone = peer(1, 1000.0, step=6, ended=LEFT)
    assert not judged(Report(step=6), 0.0, gone)
    assert "rank 1 left after step 6" in judged(Report(step=8, inside=True), 11.0, gone)


def test_a_failed_rank_is_named_with_its_error_as_soon_as_somebody_waits_for_it() -> None:
    failed = peer(1, 4.0, step=6, ended="ValueError: no more data")
    assert not judged(Report(step=7), 0.0, failed)
    assert "rank 1 ended with ValueError: no more data" in judged(Report(step=8, inside=True), 3.0, failed)
    assert not judged(Report(step=8, inside=True), 1.0, failed), "its last collective may still be under way"


def test_reports_and_processes_survive_the_store() -> None:
    report = Report(3, 40, 32, True, "a/b.py:1 (f)", "E: x")
    assert decode_report(encode(report).encode()) == report
    assert decode_process(encode(HERE).encode()) == HERE


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_on_this_host_is_known_to_be_gone_also_while_nobody_has_reaped_it() -> None:
    me = Process.this()
    assert me.pid == os.getpid() and me.state(me) == ""
    assert Process(me.host, me.pid, "another start").state(me) == "gone", "the number was given to somebody else"
    assert Process("another host", me.pid, "").state(me) == "", "cannot be seen from here"
    child = subprocess.Popen([sys.executable, "-c", ""])
    other = Process(me.host, child.pid, Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert other.state(me) == "gone"
    child.wait()
    assert other.state(me) == "gone"
