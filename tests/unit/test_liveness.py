"""Which ranks are blamed, and when, from what they have told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lordo_ds.watch import process
from lordo_ds.watch.liveness import (
    DEAF,
    END,
    FLIGHT,
    LEFT,
    SAVE,
    START,
    Finding,
    Patience,
    Peer,
    Report,
    Stall,
    decode_process,
    decode_report,
    encode,
    why_a_collective_failed,
    why_it_ends,
)
from lordo_ds.watch.process import Process
from lordo_ds.watch.timeouts import Limits

HERE = Process("this host", 1, "0")
PATIENCE = Patience.of(Limits.of(10.0), before_first_step=False)


def peer(rank: int, silent_s: float = 0.0, **facts: object) -> Peer:
    return Peer(rank, Process("another host", 7, "0"), Report(beat=1, **facts), silent_s)  # type: ignore[arg-type]


def found(
    me: Report, waited_s: float, *peers: Peer, patience: Patience = PATIENCE, still_s: float | None = None
) -> Finding:
    """What rank 0 finds."""
    return why_it_ends(me, 0, Stall(waited_s, waited_s if still_s is None else still_s), peers, HERE, patience)


def judged(me: Report, waited_s: float, *peers: Peer, **given: Patience | float) -> str:
    return found(me, waited_s, *peers, **given).reason  # type: ignore[arg-type]


def test_a_beat_that_does_not_change_is_silence_by_the_observers_clock() -> None:
    other = Peer(1)
    for elapsed, beat in ((0.0, None), (3.0, None), (2.0, 1), (4.0, 1), (1.0, 1)):
        other.hear(None if beat is None else Report(beat=beat), elapsed)
    assert other.silent_s == 5.0
    other.hear(Report(beat=2), 100.0)
    assert other.silent_s == 0.0


@pytest.mark.parametrize("block", [START, END, SAVE, ""])
def test_silence_is_blamed_after_the_timeout_and_not_before(block: str) -> None:
    me = Report(step=5, block=block)
    assert not judged(me, 0.0, peer(1, 9.0, step=5), peer(2, step=5))
    reason = judged(me, 0.0, peer(1, 11.0, step=5), peer(2, step=5))
    assert "rank 1 has been silent for 11 s" in reason and "rank 2" not in reason


def test_the_ranks_that_the_others_wait_for_are_named_with_the_place_where_they_are() -> None:
    waiting = Report(step=6, block=END)
    others = peer(1, step=6, block=END), peer(2, step=4, place="train.py:8 (load)"), peer(3, step=6)
    assert not judged(waiting, 9.0, *others)
    reason = judged(waiting, 11.0, *others)
    assert "waited 11 s at the end of step 6: rank 2 is past step 4 at train.py:8 (load)" in reason
    assert "rank 3" in reason and "rank 1" not in reason
    assert not judged(Report(step=6), 0.0, *others), "nobody waits outside the collectives"
    assert "rank 2 has been silent for 9 s" in judged(waiting, 11.0, peer(2, 9.0, step=4)), "as good as silent"


def test_the_first_step_may_take_three_times_as_long_but_silence_not() -> None:
    first = Patience.of(Limits.of(10.0), before_first_step=True)
    me, other = Report(step=1, block=END), peer(1, place="train.py:8 (load)")
    assert not judged(me, 29.0, other, patience=first)
    assert "waited 31 s at the end of step 1: rank 1 is past step 0 at train.py:8" in judged(
        me, 31.0, other, patience=first
    )
    assert "rank 1 has been silent" in judged(me, 20.0, peer(1, 11.0), patience=first)
    late = Peer(1, silent_s=20.0)
    assert not judged(Report(block=START), 20.0, late, patience=first), "it has not begun, and may still be loading"
    assert "at the start: rank 1 has never been heard of" in judged(Report(block=START), 31.0, late, patience=first)


def test_when_all_wait_for_each_other_nobody_is_blamed() -> None:
    reason = judged(Report(step=6, block=END), 11.0, peer(1, step=6, block=END))
    assert reason == "all ranks have waited for 11 s at the end of step 6"


def test_inside_a_replica_the_rank_is_named_that_has_not_begun_what_the_others_have() -> None:
    """Outside the blocks: in the engine's own collectives. Ranks 0 and 2 wait in them, for rank 1."""
    me = Report(step=6, replica=0, begun={"shard": 9, "mine": 3}, place="engine.py:1 (gather)")
    stuck = peer(1, step=6, replica=0, begun={"shard": 8, "its own": 7}, place="train.py:8 (load)")
    waiting, other_replica = peer(2, step=6, replica=0, begun={"shard": 9}), peer(3, step=5, replica=3)
    assert not judged(me, 9.0, stuck, waiting, other_replica)
    reason = judged(me, 11.0, stuck, waiting, other_replica)
    assert "in a collective of its replica at engine.py:1 (gather): rank 1 is past step 6 at train.py:8" in reason
    assert "rank 2" not in reason and "rank 3" not in reason
    assert not judged(Report(step=6, replica=0, begun={"shard": 8}), 500.0, stuck), "a long evaluation of all"
    assert not judged(me, 500.0, peer(1, step=6, replica=1, begun={"shard": 8})), "another group of that name"


def test_of_a_stuck_replica_only_the_rank_is_named_for_which_its_other_ranks_wait() -> None:
    me = Report(step=6, block=END, replica=0)
    victim = peer(1, step=4, replica=1, begun={"shard": 9}, place="engine.py:1 (gather)")
    stuck = peer(2, step=4, replica=1, begun={"shard": 8}, place="train.py:8 (load)")
    reason = judged(me, 11.0, victim, stuck)
    assert "rank 2 is past step 4 at train.py:8" in reason and "rank 1" not in reason


def test_a_pipeline_stage_that_others_wait_for_is_named_though_no_group_counts_it() -> None:
    me = Report(step=6, replica=0, waits=True, place="p2p.py:1 (recv)")
    reason = judged(
        me, 11.0, peer(1, step=6, replica=0, place="train.py:8 (f)"), peer(2, step=6, replica=0, waits=True)
    )
    assert "rank 1 is past step 6 at train.py:8" in reason and "rank 2" not in reason
    all_wait = judged(me, 11.0, peer(1, step=6, replica=0, waits=True), peer(2, step=6, replica=2))
    assert "all ranks of this replica have waited for 11 s in a collective" in all_wait


def test_a_save_may_be_slow_but_not_stand_still() -> None:
    save, waits = Report(step=6, block=SAVE, place="file.py:1 (write)"), Report(step=6, block=SAVE, waits=True)
    writes = peer(1, step=6, block=SAVE)
    assert not judged(save, 500.0, writes, still_s=29.0), "it moves"
    assert not judged(waits, 500.0, writes), "the rank that writes knows it best"
    reason = judged(save, 500.0, writes, still_s=31.0)
    assert "rank 0 has neither read nor written anything for 31 s in the save after step 6, at file.py:1" in reason
    assert not judged(waits, 29.0, peer(1, step=6, block=SAVE, waits=True))
    all_wait = judged(waits, 31.0, peer(1, step=6, block=SAVE, waits=True))
    assert all_wait == "all ranks have waited for 31 s in the save after step 6"
    outside = judged(waits, 11.0, peer(1, step=6, place="train.py:8 (load)"))
    assert "waited 11 s in the save after step 6: rank 1 is past step 6 at train.py:8" in outside


def test_a_rank_that_left_in_order_is_blamed_only_by_those_who_wait_for_it() -> None:
    gone = peer(1, 1000.0, step=6, ended=LEFT)
    assert not judged(Report(step=6), 500.0, gone)
    reason, again = found(Report(step=8, block=END), 3.0, gone)
    assert "rank 1 left after step 6" in reason and "all replicas need equally many batches" in reason
    assert not again, "it would leave again"
    same = Report(step=6, block=END)
    assert not judged(same, 3.0, gone), "it may have done its part of what ends that step"
    assert "must call finish()" in judged(same, 11.0, gone)
    assert "all ranks must save together" in judged(Report(step=6, block=SAVE), 3.0, gone)


def test_of_ranks_that_wait_for_a_sync_in_flight_the_one_that_is_in_no_collective_is_to_blame() -> None:
    me = Report(step=7, block=FLIGHT, waits=True)
    hung = peer(1, step=7, block=FLIGHT, place="a.py:3 (f)")
    waits = peer(2, step=7, block=FLIGHT, waits=True)
    reason = judged(me, 11.0, hung, waits)
    assert reason.startswith("waited 11 s for the sync in flight at the end of step 7: rank 1 is past step 7")
    assert "a.py:3 (f)" in reason and "rank 2" not in reason
    assert "rank 1 is past step 6" in judged(me, 11.0, peer(1, step=6), waits), "it has not come there yet"
    assert "all ranks have waited" in judged(me, 11.0, waits)


def test_a_broken_connection_is_the_fault_of_who_was_killed_or_else_of_who_left() -> None:
    me = Report(step=8, block=END)
    left, failed = peer(1, 9.0, step=6, ended=LEFT), peer(2, step=7, ended="ValueError: x")
    assert "rank 1 left after step 6" in why_a_collective_failed(me, [left], HERE, 5.0).reason
    assert why_a_collective_failed(me, [left, failed], HERE, 5.0).reason == "rank 2 ended with ValueError: x"
    assert not why_a_collective_failed(me, [peer(1, step=8)], HERE, 5.0).reason


def test_a_rank_whose_watchdog_failed_is_not_called_silent_or_dead() -> None:
    deaf = peer(1, 1000.0, step=6, ended=DEAF)
    assert not judged(Report(step=6, block=END), 3.0, deaf)
    assert "tells no more where it is" in judged(Report(step=8, block=END), 11.0, deaf)


def test_a_failed_rank_is_named_with_its_error_as_soon_as_somebody_waits_for_it() -> None:
    failed = peer(1, 4.0, step=6, ended="ValueError: no more data")
    assert not judged(Report(step=7), 0.0, failed)
    assert "rank 1 ended with ValueError: no more data" in judged(Report(step=8, block=END), 3.0, failed)
    assert not judged(Report(step=8, block=END), 1.0, failed), "its last collective may still be under way"


def test_reports_and_processes_survive_the_store() -> None:
    report = Report(3, 40, 32, END, "a/\udcff.py:1 (f)", "E: x", True, 2, {"shard": 3})
    assert decode_report(encode(report).encode()) == report
    assert decode_process(encode(HERE).encode()) == HERE


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_on_this_host_is_known_to_be_gone_also_while_nobody_has_reaped_it() -> None:
    me = Process.this()
    assert me.pid == os.getpid() and me.state(me) == ""
    assert Process(me.host, me.pid, "another start").state(me) == "gone", "the number was given to somebody else"
    assert Process("another host", me.pid, "").state(me) == "", "cannot be seen from here"
    child = subprocess.Popen([sys.executable, "-c", ""])
    stat = Path(f"/proc/{child.pid}/stat").read_bytes().rpartition(b")")[2].split()
    other = Process(me.host, child.pid, stat[19].decode())
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert other.state(me) == "gone"
    child.wait()
    assert other.state(me) == "gone"


def test_any_process_name_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel cuts names after 15 bytes; they may hold what its own line is written with."""
    monkeypatch.setattr(process, "PROC", tmp_path)
    (tmp_path / "7").mkdir()
    for name in ("trainé".encode() * 3)[:13], b"a) S (b", b"a\nb) c", b"\xff":
        line = b"7 (" + name + b") T " + b" ".join(b"%d" % number for number in range(4, 53))
        (tmp_path / "7" / "stat").write_bytes(line)
        assert Process("here", 7, "22").state(Process("here")) == "stopped"


@pytest.mark.parametrize(
    "timeout_s, in_steps_s, in_saves_s, limits",
    [
        (600.0, 600.0, 600.0, Limits(540.0, 540.0, 540.0)),  # DeepSpeed with NCCL, all defaults
        (600.0, 1800.0, 600.0, Limits(600.0, 1740.0, 540.0)),  # with gloo
        (10.0, 1800.0, 600.0, Limits(10.0, 30.0, 30.0)),
        (60.0, 10.0, 100.0, Limits(8.0, 8.0, 8.0)),
    ],
)
def test_the_watchdog_is_faster_than_the_process_group(
    timeout_s: float, in_steps_s: float, in_saves_s: float, limits: Limits
) -> None:
    assert Limits.of(timeout_s, in_steps_s, in_saves_s) == limits
