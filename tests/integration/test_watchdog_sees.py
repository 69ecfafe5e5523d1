"""What the watchdog must see, survive and tell apart beyond ranks that are dead: each fault ends all ranks, named."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

import lordo_ds
from lordo_ds.watch import watchdog
from lordo_ds.watch.heartbeat import Heartbeat
from lordo_ds.watch.watchdog import EXIT_CODE_AGAIN_THE_SAME
from lordo_ds.watch.whereabouts import whereabouts
from tests.watched import FAULT_STEP, STEPS, End, check, fixtures_of, train, without_start_up_table

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")]

TIMEOUT_S = 1.5
LONG_S = 100.0


def _hold_up_rank_1_in_the_first_step(rank: int, step: int) -> None:
    if (rank, step) == (1, 1):
        time.sleep(6.0)
        os._exit(1)  # as the launcher would have it by now


def _end_rank_1_early(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        dist.destroy_process_group()  # the others lose the connection before they can have heard why
        sys.exit(0)


def _end_rank_1_with_a_code(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        sys.exit(3)


def _interrupt_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        raise KeyboardInterrupt


def _fail_in_our_threads(rank: int, step: int) -> None:
    """The heartbeat's on rank 1, that which judges on rank 2."""

    def fail(*given: Any) -> None:
        raise KeyError("lost")

    if step == 3 and rank == 1:
        Heartbeat._look_around = fail  # type: ignore[method-assign]
    if step == 3 and rank == 2:
        watchdog.why_it_ends = fail
    if step == STEPS + 1:
        time.sleep(3 * TIMEOUT_S)  # the others must not call it silent


def _nobody_reads_stderr(rank: int, step: int) -> None:
    if (rank, step) == (0, FAULT_STEP):
        _end_that_stays, full = os.pipe()
        os.set_blocking(full, False)
        try:
            while True:
                os.write(full, bytes(1 << 16))
        except BlockingIOError:
            os.set_blocking(full, True)
        os.dup2(full, 2)
    if (rank, step) == (1, FAULT_STEP):
        os.kill(os.getpid(), signal.SIGKILL)


def _train_in_impatient_groups(group_timeout_s: float, timeout_s: float) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    logging.getLogger("lordo_ds").setLevel(logging.INFO)
    distributed_c10d.default_pg_timeout = timedelta(seconds=group_timeout_s)
    train(_hold_up_rank_1, timeout_s)


def _hold_up_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        time.sleep(LONG_S)


def _say_where_the_main_thread_is() -> None:
    def look() -> None:
        while threading.main_thread().is_alive():
            time.sleep(0.01)
        print(whereabouts(threading.main_thread().ident or 0).place)

    threading.Thread(target=look, name="loader").start()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).square().mean()


def _train_engine(fault: Any, timeout_s: float = TIMEOUT_S, stage: int = 3) -> None:
    """One replica of all ranks."""
    import deepspeed

    params = {"rank": 2, "sync_interval": 4, "replica_size": "all", "sync_timeout_s": timeout_s}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    optimizer = {"type": "LoRDO", "params": params}
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer, "zero_optimization": zero}
    engine = deepspeed.initialize(model=Net(), config={**config, "steps_per_print": 10**9})[0]
    for step in range(1, STEPS + 1):
        time.sleep(0.6 if step == FAULT_STEP else 0.0)
        fault(dist.get_rank(), step)
        engine.backward(engine(torch.ones(1, 6)))
        engine.step()
        if step == FAULT_STEP:
            fault(dist.get_rank(), "save", engine)
            lordo_ds.save_checkpoint(engine, "saved")
    fault(dist.get_rank(), STEPS + 1, engine)


def _stuck_in_the_first_step(rank: int, moment: Any, engine: Any = None) -> None:
    if (rank, moment) == (1, 1):
        time.sleep(LONG_S)


def _stuck_in_the_data(rank: int, moment: Any, engine: Any = None) -> None:
    if (rank, moment) == (1, FAULT_STEP):
        time.sleep(LONG_S)


def _stuck_before_the_save(rank: int, moment: Any, engine: Any = None) -> None:
    if (rank, moment) == (1, "save"):
        time.sleep(LONG_S)


def _stuck_in_the_save(rank: int, moment: Any, engine: Any = None) -> None:
    if (rank, moment) == (1, "save"):
        engine.checkpoint_engine.save = lambda state_dict, path: time.sleep(LONG_S)


def _leave_within_a_beat_on_rank_1(rank: int, moment: Any, engine: Any = None) -> None:
    """What rank 0 tells of itself, and knows of rank 1, is then as old as its last beat: of a wait for rank 1."""
    if (rank, moment) == (0, STEPS):
        heartbeat = next(iter(watchdog._watching))._heartbeat
        threading.Timer(0.5, heartbeat.ask).start()
    if (rank, moment) == (1, STEPS):
        time.sleep(1.0)
    if (rank, moment) == (0, STEPS + 1):
        time.sleep(4.0)


def _train_pipeline(fault: Any) -> None:
    """Two stages, of one replica; what they send each other is counted in no group of the replica's."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        fault(dist.get_rank(), step)
        return (output - target).square().mean()

    deepspeed.init_distributed("gloo")
    module = PipelineModule([nn.Linear(6, 6), nn.Linear(6, 6)], num_stages=2, loss_fn=loss)
    params = {"rank": 2, "sync_interval": 4, "sync_timeout_s": TIMEOUT_S}
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "LoRDO", "params": params}}
    engine = deepspeed.initialize(model=module, config={**config, "steps_per_print": 10**9})[0]
    for step in range(1, STEPS + 1):  # noqa: B007 - the loss function reads it
        engine.train_batch(iter([(torch.ones(1, 6), torch.ones(1, 6))]))


def _write_slowly(rank: int, moment: Any, engine: Any = None) -> None:
    if (rank, moment) == (1, "save"):
        save = engine.checkpoint_engine.save

        def on_a_slow_disk(state_dict: Any, path: str) -> Any:
            with open(f"{path}.slow", "wb", buffering=0) as stream:
                for _ in range(20):
                    stream.write(b"x")
                    time.sleep(0.3)
            os.remove(f"{path}.slow")
            return save(state_dict, path)

        engine.checkpoint_engine.save = on_a_slow_disk


def _watched_again_and_again() -> None:
    """Prints what the watchdog tells of a rank that resumed from step 3, and how many files are open after each."""
    without_start_up_table()
    torch.manual_seed(dist.get_rank())
    state: dict[str, Any] = {}
    open_files = []
    for _ in range(4):
        weight = nn.Parameter(torch.ones(4, 3))
        optimizer = lordo_ds.LoRDO([("weight", weight)], rank=2, sync_interval=2, sync_timeout_s=TIMEOUT_S)
        if state:
            optimizer.load_state_dict(state)
            report = optimizer.watchdog._heartbeat.report
        else:
            for _ in range(3):
                weight.grad = torch.randn(4, 3)
                optimizer.step()
            state = optimizer.state_dict()
        optimizer._detach()
        dist.barrier()
        time.sleep(0.5)  # rank 0 has the store, and ends once the others have
        open_files.append(len(os.listdir("/proc/self/fd")))
    print(json.dumps([report.step, report.synced, open_files]))


# -- the cases ---------------------------------------------------------------------------------------

CASES: dict[str, tuple[int, tuple[Any, ...]]] = {  # ranks, and what they run
    "first step": (2, (train, _hold_up_rank_1_in_the_first_step, 1.0)),
    "out of data": (3, (train, _end_rank_1_early, TIMEOUT_S)),
    "exit code": (3, (train, _end_rank_1_with_a_code, TIMEOUT_S)),
    "interrupt": (3, (train, _interrupt_rank_1, TIMEOUT_S)),
    "own failure": (3, (train, _fail_in_our_threads, TIMEOUT_S)),
    "full pipe": (2, (train, _nobody_reads_stderr, TIMEOUT_S)),
    "impatient groups": (2, (_train_in_impatient_groups, 5.0, 30.0)),
    "thread": (1, (_say_where_the_main_thread_is,)),
    "again": (2, (_watched_again_and_again,)),
    "first step of an engine": (2, (_train_engine, _stuck_in_the_first_step)),
    "data": (2, (_train_engine, _stuck_in_the_data)),
    "before a save": (2, (_train_engine, _stuck_before_the_save)),
    "save": (2, (_train_engine, _stuck_in_the_save)),
    "slow disk": (2, (_train_engine, _write_slowly)),
    "leaves": (2, (_train_engine, _leave_within_a_beat_on_rank_1, 50.0, 1)),
    "pipeline": (2, (_train_pipeline, _stuck_in_the_data)),
}


launches, ends = fixtures_of(CASES)


# -- what is seen ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["first step"], indirect=True)
def test_a_rank_stuck_in_its_first_step_is_named(ends: list[End]) -> None:
    """Without an engine it is heard of only from the end of that step on."""
    check(ends, [0], ("at the start: rank 1 has never been heard of", "Last completed sync: none"))


@pytest.mark.parametrize("ends", ["out of data"], indirect=True)
def test_a_rank_that_is_out_of_data_first_is_not_called_killed(ends: list[End]) -> None:
    words = ("rank 1 left after step 4", "equally many batches", "A restart would end in the same")
    assert ends[1].exit_code == 0
    check(ends, [0, 2], words, (EXIT_CODE_AGAIN_THE_SAME,))
    assert not any(word in end.output for end in ends for word in ("killed", "Restart from")), ends


@pytest.mark.parametrize(
    "ends, words",
    [("exit code", "rank 1 ended with SystemExit: 3"), ("interrupt", "rank 1 ended with KeyboardInterrupt")],
    indirect=["ends"],
)
def test_how_a_rank_ended_otherwise_is_told(ends: list[End], words: str) -> None:
    check(ends, [0, 2], (words, "Restart from the last checkpoint"))


@pytest.mark.parametrize("ends", ["own failure"], indirect=True)
def test_a_run_goes_on_when_a_thread_of_the_watchdog_fails_and_says_so(ends: list[End]) -> None:
    assert [end.exit_code for end in ends] == [0, 0, 0], ends
    assert not ends[0].lines, ends
    for rank, which in ((1, "heartbeat"), (2, "watchdog")):
        assert f"the {which} of rank {rank} failed (KeyError: 'lost')" in ends[rank].output, ends
        assert "is not noticed here any more" in ends[rank].output


@pytest.mark.parametrize("ends", ["full pipe"], indirect=True)
def test_it_ends_although_nobody_reads_its_stderr(ends: list[End]) -> None:
    assert ends[0].exit_code == watchdog.EXIT_CODE, ends


@pytest.mark.parametrize("ends", ["impatient groups"], indirect=True)
def test_the_watchdog_speaks_before_the_process_groups_own_timeout(ends: list[End]) -> None:
    check(ends, [0, 1], ("rank 1 is past step 4", "_hold_up_rank_1"))
    said = "sync_timeout_s = 30: the process groups give up after 5 s, so 4 s are used"
    assert ends[0].output.count(said) == 1, ends[0].output
    assert not any("Timed out" in end.output for end in ends), ends


@pytest.mark.parametrize("ends", ["thread"], indirect=True)
def test_a_rank_that_a_thread_keeps_alive_says_so(ends: list[End]) -> None:
    assert ends[0].output.strip() == "its end, waiting for the thread(s) loader"


@pytest.mark.parametrize("ends", ["again"], indirect=True)
def test_a_resumed_rank_tells_its_step_and_watchdogs_that_ended_keep_nothing_open(ends: list[End]) -> None:
    for end in ends:
        step, synced, open_files = json.loads(end.output)
        assert (step, synced) == (3, 2)
        assert open_files[1:] == open_files[1:2] * 3, open_files


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    "ends, words",
    [
        ("first step of an engine", ("rank 1 is past step 0", "_stuck_in_the_first_step", "sync: none")),
        ("data", ("in a collective of its replica", "rank 1 is past step 4", "_stuck_in_the_data")),
        ("before a save", ("in the save after step 5: rank 1 is past step 5", "_stuck_before_the_save")),
        ("save", ("rank 1 has neither read nor written anything", "in the save after step 5")),
    ],
    indirect=["ends"],
)
def test_a_rank_stuck_inside_a_replica_or_in_a_save_is_named(ends: list[End], words: tuple[str, ...]) -> None:
    check(ends, [0, 1], words)


@pytest.mark.deepspeed
@pytest.mark.parametrize("ends", ["pipeline"], indirect=True)
def test_a_stuck_pipeline_stage_is_named(ends: list[End]) -> None:
    check(ends, [0, 1], ("rank 1 is past step 4", "_stuck_in_the_data"))


@pytest.mark.deepspeed
@pytest.mark.parametrize("ends", ["slow disk"], indirect=True)
def test_a_slow_disk_is_no_fault(ends: list[End]) -> None:
    """Four times the timeout in one save, and more than it may stand still."""
    assert [end.exit_code for end in ends] == [0, 0], ends
    assert not any("Last completed sync" in end.output for end in ends), ends


@pytest.mark.deepspeed
@pytest.mark.parametrize("ends", ["leaves"], indirect=True)
def test_a_rank_that_is_done_first_is_not_called_killed_before_its_last_word_is_read(ends: list[End]) -> None:
    assert [end.exit_code for end in ends] == [0, 0], ends
    assert ends[0].seconds > 4.0
