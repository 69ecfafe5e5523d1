"""What the watchdog must see, survive and tell apart beyond ranks that are dead: each fault ends all ranks, named."""

from __future__ import annotations

import os
import signal
import sys
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
from lordo_ds.dist import watchdog
from lordo_ds.dist.heartbeat import Heartbeat
from lordo_ds.dist.watchdog import EXIT_CODE_AGAIN_THE_SAME
from tests.watched import FAULT_STEP, STEPS, check, run, train

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")]

TIMEOUT_S = 1.5
LONG_S = 100.0


def _hold_up_rank_1_in_the_first_step(rank: int, step: int) -> None:
    if (rank, step) == (1, 1):
        time.sleep(6.0)


def test_a_rank_stuck_in_its_first_step_is_named(tmp_path: Path) -> None:
    """Without an engine it is heard of only from the end of that step on."""
    ends = run(tmp_path, train, _hold_up_rank_1_in_the_first_step, 1.0, world=2)
    check(ends, [0], ("at the start: rank 1 has never been heard of", "Last completed sync: none"))


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


def test_a_rank_that_is_out_of_data_first_is_not_called_killed(tmp_path: Path) -> None:
    ends = run(tmp_path, train, _end_rank_1_early, TIMEOUT_S)
    words = ("rank 1 left after step 4", "equally many batches", "A restart would end in the same")
    assert ends[1].exit_code == 0
    check(ends, [0, 2], words, (EXIT_CODE_AGAIN_THE_SAME,))
    assert not any(word in end.output for end in ends for word in ("killed", "Restart from")), ends


@pytest.mark.parametrize(
    "fault, words",
    [(_end_rank_1_with_a_code, "rank 1 ended with SystemExit: 3"), (_interrupt_rank_1, "rank 1 ended with Keyboard")],
)
def test_how_a_rank_ended_otherwise_is_told(tmp_path: Path, fault: Any, words: str) -> None:
    check(run(tmp_path, train, fault, TIMEOUT_S), [0, 2], (words, "Restart from the last checkpoint"))


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


def test_a_run_goes_on_when_a_thread_of_the_watchdog_fails_and_says_so(tmp_path: Path) -> None:
    ends = run(tmp_path, train, _fail_in_our_threads, TIMEOUT_S)
    assert [end.exit_code for end in ends] == [0, 0, 0], ends
    assert not ends[0].lines, ends
    for rank, which in ((1, "heartbeat"), (2, "watchdog")):
        assert f"the {which} of rank {rank} failed (KeyError: 'lost')" in ends[rank].output, ends
        assert "is not noticed here any more" in ends[rank].output


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


def test_it_ends_although_nobody_reads_its_stderr(tmp_path: Path) -> None:
    ends = run(tmp_path, train, _nobody_reads_stderr, TIMEOUT_S, world=2, wait_s=30.0)
    assert ends[0].exit_code == watchdog.EXIT_CODE, ends


def _train_in_impatient_groups(timeout_s: float) -> None:
    """As DeepSpeed's with NCCL: their timeout is our own's default."""
    distributed_c10d.default_pg_timeout = timedelta(seconds=timeout_s)
    train(_hold_up_rank_1, timeout_s)


def _hold_up_rank_1(rank: int, step: int) -> None:
    if (rank, step) == (1, FAULT_STEP):
        time.sleep(LONG_S)


def test_the_watchdog_speaks_before_the_process_groups_own_timeout(tmp_path: Path) -> None:
    ends = run(tmp_path, _train_in_impatient_groups, 4.0, world=2)
    check(ends, [0, 1], ("rank 1 is past step 4", "_hold_up_rank_1"))
    assert not any("Timed out" in end.output for end in ends), ends


# -- in an engine ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).square().mean()


def _train_engine(fault: Any, folder: str) -> None:
    """One replica of all ranks, at ZeRO 3."""
    import deepspeed

    params = {"rank": 2, "sync_interval": 4, "replica_size": "all", "sync_timeout_s": TIMEOUT_S}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
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
            lordo_ds.save_checkpoint(engine, folder)


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


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    "fault, words",
    [
        (_stuck_in_the_first_step, ("rank 1 is past step 0", "_stuck_in_the_first_step", "sync: none")),
        (_stuck_in_the_data, ("in a collective of its replica", "rank 1 is past step 4", "_stuck_in_the_data")),
        (_stuck_before_the_save, ("in the save after step 5: rank 1 is past step 5", "_stuck_before_the_save")),
        (_stuck_in_the_save, ("rank 1 has neither read nor written anything", "in the save after step 5")),
    ],
)
def test_a_rank_stuck_inside_a_replica_or_in_a_save_is_named(tmp_path: Path, fault: Any, words: Any) -> None:
    ends = run(tmp_path, _train_engine, fault, str(tmp_path / "saved"), world=2)
    check(ends, [0, 1], words)


def _write_slowly(rank: int, moment: Any, engine: Any = None) -> None:
    if (rank, moment) == (1, "save"):
        save = engine.checkpoint_engine.save

        def on_a_slow_disk(state_dict: Any, path: str) -> Any:
            with open(f"{path}.slow", "wb", buffering=0) as stream:
                for _ in range(30):
                    stream.write(b"x")
                    time.sleep(0.25)
            os.remove(f"{path}.slow")
            return save(state_dict, path)

        engine.checkpoint_engine.save = on_a_slow_disk


@pytest.mark.deepspeed
def test_a_slow_disk_is_no_fault(tmp_path: Path) -> None:
    """Five times the timeout in one save."""
    ends = run(tmp_path, _train_engine, _write_slowly, str(tmp_path / "saved"), world=2)
    assert [end.exit_code for end in ends] == [0, 0], ends
    assert not any("Last completed sync" in end.output for end in ends), ends
