"""Killed, frozen, stuck and failing ranks: every survivor ends by itself and says which rank is to blame."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.watched import FAULT_STEP, STEPS, TIMEOUT_S, End, Fault, check, run, train

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")]

SLACK_S = 8.0  # for a busy machine


def run_with(tmp_path: Path, fault: Fault) -> list[End]:
    return run(tmp_path, train, fault, TIMEOUT_S)


def _kill_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        os.kill(os.getpid(), signal.SIGKILL)


def test_survivors_of_a_killed_process_name_it(tmp_path: Path) -> None:
    """gloo raises in whoever is in a collective with it, at once."""
    ends = run_with(tmp_path, _kill_rank_1)
    check(ends, [0, 2], ("rank 1 is gone", "Last completed sync: step 4"))
    assert all(len(ends[rank].lines) == 1 for rank in (0, 2)), "one line"


def _stop_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        os.kill(os.getpid(), signal.SIGSTOP)


def test_survivors_of_a_frozen_process_end_within_the_timeout_and_name_it(tmp_path: Path) -> None:
    ends = run_with(tmp_path, _stop_rank_1)
    check(ends, [0, 2], ("rank 1 has been silent", "is stopped by a signal", "Last completed sync: step 4"))
    assert all(ends[rank].seconds < TIMEOUT_S + SLACK_S for rank in (0, 2))
    assert all(len(ends[rank].lines) == 1 for rank in (0, 2)), "one line"


def _stop_rank_1_while_the_others_work(rank: int, step: int) -> None:
    _stop_rank_1(rank, step)
    if step == FAULT_STEP:
        time.sleep(60)


def test_a_frozen_process_is_found_while_nobody_waits_for_it(tmp_path: Path) -> None:
    ends = run_with(tmp_path, _stop_rank_1_while_the_others_work)
    check(ends, [0, 2], ("rank 1 has been silent", "Last completed sync: step 4"))
    assert all(ends[rank].seconds < TIMEOUT_S + SLACK_S for rank in (0, 2))


def _stop_rank_0(rank: int, step: int) -> None:
    if (rank, step) == (0, FAULT_STEP):
        os.kill(os.getpid(), signal.SIGSTOP)


def test_the_store_frozen_with_rank_0_is_named_as_such(tmp_path: Path) -> None:
    ends = run_with(tmp_path, _stop_rank_0)
    check(ends, [1, 2], ("rank 0", "key-value store", "has not answered", "Last completed sync: step 4"))


def _kill_rank_0_while_the_others_work(rank: int, step: int) -> None:
    if step == FAULT_STEP:
        os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(60)


def test_the_store_that_died_with_rank_0_is_named_as_such(tmp_path: Path) -> None:
    ends = run_with(tmp_path, _kill_rank_0_while_the_others_work)
    check(ends, [1, 2], ("rank 0 is gone", "key-value store", "Last completed sync: step 4"))
    assert all(ends[rank].seconds < TIMEOUT_S + SLACK_S for rank in (1, 2))


def _hold_up_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        time.sleep(60)


def test_a_rank_stuck_in_code_of_its_own_ends_all_of_them_and_the_place_is_told(tmp_path: Path) -> None:
    ends = run_with(tmp_path, _hold_up_rank_1)
    words = ("rank 1", "past step 4", "test_watchdog.py", "_hold_up_rank_1", "Last completed sync: step 4")
    check(ends, [0, 1, 2], words)
    assert all(end.seconds < TIMEOUT_S + SLACK_S for end in ends)


def _fail_on_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        raise ValueError("no more data")
    if step == FAULT_STEP:
        time.sleep(2 * TIMEOUT_S)  # late enough for the message to have come


def test_an_exception_on_one_rank_is_told_by_the_others(tmp_path: Path) -> None:
    ends = run_with(tmp_path, _fail_on_rank_1)
    assert ends[1].exit_code == 1
    check(ends, [0, 2], ("rank 1 ended with ValueError: no more data",))


def _take_long_where_that_is_allowed(rank: int, step: int) -> None:
    """A first step that compiles on one rank only, and an evaluation on all."""
    if step == 1 and rank == 1:
        time.sleep(1.5 * TIMEOUT_S)
    if step == FAULT_STEP:
        time.sleep(2 * TIMEOUT_S)


def test_first_steps_and_evaluations_may_take_longer_than_the_timeout(tmp_path: Path) -> None:
    ends = run_with(tmp_path, _take_long_where_that_is_allowed)
    assert [end.exit_code for end in ends] == [0, 0, 0], ends
    assert not any(end.lines for end in ends), ends


def _stay_behind_on_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, STEPS + 1):
        time.sleep(3 * TIMEOUT_S)


def test_ranks_that_end_in_order_do_not_alarm_one_that_stays(tmp_path: Path) -> None:
    """Also rank 0, which takes the store along."""
    ends = run_with(tmp_path, _stay_behind_on_rank_1)
    assert [end.exit_code for end in ends] == [0, 0, 0], ends
    assert not any(end.lines for end in ends), ends
    assert ends[1].seconds > TIMEOUT_S
