"""Killed, frozen, stuck and failing ranks: every survivor ends by itself and says which rank is to blame."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.watched import FAULT_STEP, STEPS, TIMEOUT_S, WORLD, End, Fault, check, fixtures_of, train

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")]

SLACK_S = 8.0  # for a busy machine


def _kill_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        os.kill(os.getpid(), signal.SIGKILL)


def _stop_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        os.kill(os.getpid(), signal.SIGSTOP)


def _stop_rank_1_while_the_others_work(rank: int, step: int) -> None:
    _stop_rank_1(rank, step)
    if step == FAULT_STEP:
        time.sleep(60)


def _stop_rank_0(rank: int, step: int) -> None:
    if (rank, step) == (0, FAULT_STEP):
        os.kill(os.getpid(), signal.SIGSTOP)


def _kill_rank_0_while_the_others_work(rank: int, step: int) -> None:
    if step == FAULT_STEP:
        os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(60)


def _hold_up_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        time.sleep(60)


def _fail_on_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        raise ValueError("no more data")
    if step == FAULT_STEP:
        time.sleep(2 * TIMEOUT_S)  # late enough for the message to have come


def _take_long_where_that_is_allowed(rank: int, step: int) -> None:
    """A first step that compiles on one rank only, and an evaluation on all."""
    if step == 1 and rank == 1:
        time.sleep(1.5 * TIMEOUT_S)
    if step == FAULT_STEP:
        time.sleep(2 * TIMEOUT_S)


def _stay_behind_on_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, STEPS + 1):
        time.sleep(3 * TIMEOUT_S)


FAULTS: dict[str, Fault] = {
    "killed": _kill_rank_1,
    "frozen": _stop_rank_1,
    "frozen among busy ones": _stop_rank_1_while_the_others_work,
    "frozen store": _stop_rank_0,
    "killed store": _kill_rank_0_while_the_others_work,
    "stuck": _hold_up_rank_1,
    "exception": _fail_on_rank_1,
    "slow": _take_long_where_that_is_allowed,
    "stays": _stay_behind_on_rank_1,
}


launches, ends = fixtures_of({name: (WORLD, (train, fault, TIMEOUT_S)) for name, fault in FAULTS.items()})


@pytest.mark.parametrize("ends", ["killed"], indirect=True)
def test_survivors_of_a_killed_process_name_it(ends: list[End]) -> None:
    """gloo raises in whoever is in a collective with it, at once."""
    check(ends, [0, 2], ("rank 1 is gone", "Last completed sync: step 4"))
    assert all(len(ends[rank].lines) == 1 for rank in (0, 2)), "one line"


@pytest.mark.parametrize("ends", ["frozen"], indirect=True)
def test_survivors_of_a_frozen_process_end_within_the_timeout_and_name_it(ends: list[End]) -> None:
    check(ends, [0, 2], ("rank 1 has been silent", "is stopped by a signal", "Last completed sync: step 4"))
    assert all(ends[rank].seconds < TIMEOUT_S + SLACK_S for rank in (0, 2))
    assert all(len(ends[rank].lines) == 1 for rank in (0, 2)), "one line"


@pytest.mark.parametrize("ends", ["frozen among busy ones"], indirect=True)
def test_a_frozen_process_is_found_while_nobody_waits_for_it(ends: list[End]) -> None:
    check(ends, [0, 2], ("rank 1 has been silent", "Last completed sync: step 4"))
    assert all(ends[rank].seconds < TIMEOUT_S + SLACK_S for rank in (0, 2))


@pytest.mark.parametrize("ends", ["frozen store"], indirect=True)
def test_the_store_frozen_with_rank_0_is_named_as_such(ends: list[End]) -> None:
    check(ends, [1, 2], ("rank 0", "key-value store", "has not answered", "Last completed sync: step 4"))


@pytest.mark.parametrize("ends", ["killed store"], indirect=True)
def test_the_store_that_died_with_rank_0_is_named_as_such(ends: list[End]) -> None:
    check(ends, [1, 2], ("rank 0 is gone", "key-value store", "Last completed sync: step 4"))
    assert all(ends[rank].seconds < TIMEOUT_S + SLACK_S for rank in (1, 2))


@pytest.mark.parametrize("ends", ["stuck"], indirect=True)
def test_a_rank_stuck_in_code_of_its_own_ends_all_of_them_and_the_place_is_told(ends: list[End]) -> None:
    words = ("rank 1", "past step 4", "test_watchdog.py", "_hold_up_rank_1", "Last completed sync: step 4")
    check(ends, [0, 1, 2], words)
    assert all(end.seconds < TIMEOUT_S + SLACK_S for end in ends)


@pytest.mark.parametrize("ends", ["exception"], indirect=True)
def test_an_exception_on_one_rank_is_told_by_the_others(ends: list[End]) -> None:
    assert ends[1].exit_code == 1
    check(ends, [0, 2], ("rank 1 ended with ValueError: no more data",))


@pytest.mark.parametrize("ends", ["slow"], indirect=True)
def test_first_steps_and_evaluations_may_take_longer_than_the_timeout(ends: list[End]) -> None:
    assert [end.exit_code for end in ends] == [0, 0, 0], ends
    assert not any(end.lines for end in ends), ends


@pytest.mark.parametrize("ends", ["stays"], indirect=True)
def test_ranks_that_end_in_order_do_not_alarm_one_that_stays(ends: list[End]) -> None:
    """Also rank 0, which takes the store along."""
    assert [end.exit_code for end in ends] == [0, 0, 0], ends
    assert not any(end.lines for end in ends), ends
    assert ends[1].seconds > TIMEOUT_S
