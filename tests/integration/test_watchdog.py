"""Killed, frozen, stuck and failing ranks: every survivor ends by itself and says which rank is to blame."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lordo_ds import LoRDO
from lordo_ds.dist.watchdog import EXIT_CODE
from tests import ranks as harness

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")]

WORLD, TIMEOUT_S, FAULT_STEP, STEPS = 3, 2.0, 5, 8
SLACK_S = 8.0  # for a busy machine


@dataclass
class End:
    """How one rank ended; `exit_code` is None if it had to be ended."""

    exit_code: int | None
    seconds: float
    output: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.output.splitlines() if "LoRDO: " in line]


def _train(fault: Callable[[int, int], None], timeout_s: float) -> None:
    """Each rank a replica, in sync after every second step; `fault` is called with (rank, step) before each, and at
    the end.
    """
    logging.getLogger("lordo_ds").setLevel(logging.WARNING)  # what is looked at is no start-up table
    torch.manual_seed(dist.get_rank())
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = LoRDO([("weight", weight)], rank=2, sync_interval=2, sync_timeout_s=timeout_s)
    for step in range(1, STEPS + 1):
        time.sleep(0.6 if step == FAULT_STEP else 0.0)  # three beats: the ranks have heard of each other
        fault(dist.get_rank(), step)
        weight.grad = torch.randn(4, 3)
        optimizer.step()
    fault(dist.get_rank(), STEPS + 1)


def _rank_main(rank: int, folder: str, port: int, fault: Callable[[int, int], None], timeout_s: float) -> None:
    harness._redirect_output(Path(folder) / f"output{rank}.txt")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    (Path(folder) / f"started{rank}").touch()
    _train(fault, timeout_s)


def run(
    tmp_path: Path, fault: Callable[[int, int], None], wait_s: float = 60.0, timeout_s: float = TIMEOUT_S
) -> list[End]:
    """The ends of all ranks, those that end by themselves within `wait_s` of the start of training."""
    harness._ensure_server()
    context = multiprocessing.get_context("forkserver")
    port = harness.free_port()
    arguments = [(rank, str(tmp_path), port, fault, timeout_s) for rank in range(WORLD)]
    processes: list[Any] = [context.Process(target=_rank_main, args=given) for given in arguments]
    for process in processes:
        process.start()
    while not all((tmp_path / f"started{rank}").exists() for rank in range(WORLD)):
        time.sleep(0.02)
    began, seconds = time.monotonic(), [wait_s] * WORLD
    while any(left := [p.exitcode is None for p in processes]) and time.monotonic() - began < wait_s:
        if _only_stopped_are_left(processes):
            break
        for rank, running in enumerate(left):
            seconds[rank] = time.monotonic() - began if running else seconds[rank]
        time.sleep(0.05)
    ends = []
    for rank, process in enumerate(processes):
        exit_code = process.exitcode
        if exit_code is None:
            process.kill()
        process.join()
        ends.append(End(exit_code, seconds[rank], (tmp_path / f"output{rank}.txt").read_text()))
    return ends


def _only_stopped_are_left(processes: list[Any]) -> bool:
    left = [p.pid for p in processes if p.exitcode is None]
    try:
        states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in left]
    except (FileNotFoundError, ProcessLookupError):  # one ended meanwhile
        return False
    return bool(left) and all(state == "T" for state in states)


def _check(
    ends: list[End], survivors: list[int], words: tuple[str, ...], codes: tuple[int, ...] = (EXIT_CODE,)
) -> None:
    for rank in survivors:
        assert ends[rank].exit_code in codes, f"rank {rank}: {ends[rank]}"
        assert any(all(word in line for word in words) for line in ends[rank].lines), (
            f"rank {rank}: {ends[rank].output}"
        )


def _kill_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        os.kill(os.getpid(), signal.SIGKILL)


def test_survivors_of_a_killed_process_name_it(tmp_path: Path) -> None:
    """gloo raises in whoever is in a collective with it, at once."""
    ends = run(tmp_path, _kill_rank_1)
    _check(ends, [0, 2], ("rank 1 is gone", "Last completed sync: step 4"))
    assert all(len(ends[rank].lines) == 1 for rank in (0, 2)), "one line"


def _stop_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        os.kill(os.getpid(), signal.SIGSTOP)


def test_survivors_of_a_frozen_process_end_within_the_timeout_and_name_it(tmp_path: Path) -> None:
    ends = run(tmp_path, _stop_rank_1)
    _check(ends, [0, 2], ("rank 1 has been silent", "is stopped by a signal", "Last completed sync: step 4"))
    assert all(ends[rank].seconds < TIMEOUT_S + SLACK_S for rank in (0, 2))
    assert all(len(ends[rank].lines) == 1 for rank in (0, 2)), "one line"


def _stop_rank_1_while_the_others_work(rank: int, step: int) -> None:
    _stop_rank_1(rank, step)
    if step == FAULT_STEP:
        time.sleep(60)


def test_a_frozen_process_is_found_while_nobody_waits_for_it(tmp_path: Path) -> None:
    ends = run(tmp_path, _stop_rank_1_while_the_others_work)
    _check(ends, [0, 2], ("rank 1 has been silent", "Last completed sync: step 4"))
    assert all(ends[rank].seconds < TIMEOUT_S + SLACK_S for rank in (0, 2))


def _stop_rank_0(rank: int, step: int) -> None:
    if (rank, step) == (0, FAULT_STEP):
        os.kill(os.getpid(), signal.SIGSTOP)


def test_the_store_frozen_with_rank_0_is_named_as_such(tmp_path: Path) -> None:
    ends = run(tmp_path, _stop_rank_0)
    _check(ends, [1, 2], ("rank 0", "key-value store", "has not answered", "Last completed sync: step 4"))


def _kill_rank_0_while_the_others_work(rank: int, step: int) -> None:
    if step == FAULT_STEP:
        os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(60)


def test_the_store_that_died_with_rank_0_is_named_as_such(tmp_path: Path) -> None:
    ends = run(tmp_path, _kill_rank_0_while_the_others_work)
    _check(ends, [1, 2], ("rank 0 is gone", "key-value store", "Last completed sync: step 4"))
    assert all(ends[rank].seconds < TIMEOUT_S + SLACK_S for rank in (1, 2))


def _hold_up_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        time.sleep(60)


def test_a_rank_stuck_in_code_of_its_own_ends_all_of_them_and_the_place_is_told(tmp_path: Path) -> None:
    ends = run(tmp_path, _hold_up_rank_1)
    words = ("rank 1", "past step 4", "test_watchdog.py", "_hold_up_rank_1", "Last completed sync: step 4")
    _check(ends, [0, 1, 2], words)
    assert all(end.seconds < TIMEOUT_S + SLACK_S for end in ends)


def _fail_on_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        raise ValueError("no more data")
    if step == FAULT_STEP:
        time.sleep(2 * TIMEOUT_S)  # late enough for the message to have come


def test_an_exception_on_one_rank_is_told_by_the_others(tmp_path: Path) -> None:
    ends = run(tmp_path, _fail_on_rank_1)
    assert ends[1].exit_code == 1
    _check(ends, [0, 2], ("rank 1 ended with ValueError: no more data",))


def _take_long_where_that_is_allowed(rank: int, step: int) -> None:
    """A first step that compiles on one rank only, and an evaluation on all."""
    if step == 1 and rank == 1:
        time.sleep(2 * TIMEOUT_S)
    if step == FAULT_STEP:
        time.sleep(2 * TIMEOUT_S)


def test_first_steps_and_evaluations_may_take_longer_than_the_timeout(tmp_path: Path) -> None:
    ends = run(tmp_path, _take_long_where_that_is_allowed)
    assert [end.exit_code for end in ends] == [0, 0, 0], ends
    assert not any(end.lines for end in ends), ends


def _stay_behind_on_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, STEPS + 1):
        time.sleep(3 * TIMEOUT_S)


def test_ranks_that_end_in_order_do_not_alarm_one_that_stays(tmp_path: Path) -> None:
    """Also rank 0, which takes the store along."""
    ends = run(tmp_path, _stay_behind_on_rank_1)
    assert [end.exit_code for end in ends] == [0, 0, 0], ends
    assert not any(end.lines for end in ends), ends
    assert ends[1].seconds > TIMEOUT_S
