"""A rank that dies, or hangs, while a sync is in flight: every survivor ends by itself and says which rank it is."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lordo_ds.sync.bucket import BucketSync
from tests.watched import FAULT_STEP, TIMEOUT_S, WORLD, End, Fault, check, fixtures_of, train

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")]


def _nothing(rank: int, step: int) -> None:
    pass


def _kill_rank_1(rank: int, step: int) -> None:
    """In flight, from the end of step 4 on, is what lands at the end of step 5."""
    if (rank, step) == (1, FAULT_STEP):
        os.kill(os.getpid(), signal.SIGKILL)


def _hold_up_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP + 1):
        time.sleep(60)


def _hang_beside_training_on_rank_1(rank: int, step: int) -> None:
    """Its main thread goes on, and then waits for the other as those of all ranks do."""
    if (rank, step) == (1, FAULT_STEP + 1):
        BucketSync.run_ = _never_ends  # type: ignore[method-assign]


def _never_ends(*_: Any) -> None:
    time.sleep(60)


FAULTS: dict[str, Fault] = {
    "killed": _kill_rank_1,
    "stuck": _hold_up_rank_1,
    "hung beside training": _hang_beside_training_on_rank_1,
    "well": _nothing,
}


def train_streaming(fault: Fault) -> None:
    train(fault, TIMEOUT_S, streaming={"delay_steps": 1})


launches, ends = fixtures_of({name: (WORLD, (train_streaming, fault)) for name, fault in FAULTS.items()})


@pytest.mark.parametrize("ends", ["killed"], indirect=True)
def test_survivors_of_a_killed_process_name_it(ends: list[End]) -> None:
    check(ends, [0, 2], ("rank 1 is gone", "Last completed sync: step"))


@pytest.mark.parametrize("ends", ["stuck"], indirect=True)
def test_a_rank_that_does_not_come_is_named_where_its_sync_must_land(ends: list[End]) -> None:
    check(ends, [0, 1, 2], ("rank 1", "past step 5", "_hold_up_rank_1", "Last completed sync: step 5"))


@pytest.mark.parametrize("ends", ["hung beside training"], indirect=True)
def test_a_hang_beside_training_is_found_and_its_place_is_told(ends: list[End]) -> None:
    words = ("rank 1", "for the sync in flight at the end of step 7", "_never_ends", "Last completed sync: step 5")
    check(ends, [0, 1, 2], words)


@pytest.mark.parametrize("ends", ["well"], indirect=True)
def test_a_run_that_ends_in_flight_ends_well(ends: list[End]) -> None:
    """The last sync began at the last step: the interpreter waits for it."""
    assert [end.exit_code for end in ends] == [0, 0, 0], ends
    assert not any(end.lines for end in ends), ends
