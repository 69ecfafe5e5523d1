"""Runs ranks that are killed, frozen, stuck or fail, and gives back how each of them ended, and what it said."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lordo_ds import LoRDO
from lordo_ds.watch.watchdog import EXIT_CODE
from tests import ranks as harness

WORLD, TIMEOUT_S, FAULT_STEP, STEPS = 3, 2.0, 5, 8
# The kernel cuts the name of a process after 15 bytes: here inside a character, and with what its line is written with.
PROCESS_NAME = ") R (train\nün".encode() + "é".encode()[:1]

Fault = Callable[[int, int], None]
_starting = threading.Lock()


@dataclass
class End:
    """How one rank ended; `exit_code` is None if it had to be ended."""

    exit_code: int | None
    seconds: float
    output: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.output.splitlines() if "LoRDO: " in line]


def without_start_up_table() -> None:
    """What is looked at comes after it; a job that wants to hear more has said so."""
    logger = logging.getLogger("lordo_ds")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)


def train(fault: Fault, timeout_s: float, **settings: Any) -> None:
    """Each rank a replica, in sync after every second step; `fault` is called with (rank, step) before each, and at
    the end.
    """
    without_start_up_table()
    torch.manual_seed(dist.get_rank())
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = LoRDO([("weight", weight)], rank=2, sync_interval=2, sync_timeout_s=timeout_s, **settings)
    for step in range(1, STEPS + 1):
        time.sleep(0.6 if step == FAULT_STEP else 0.0)  # three beats: the ranks have heard of each other
        fault(dist.get_rank(), step)
        weight.grad = torch.randn(4, 3)
        optimizer.step()
    fault(dist.get_rank(), STEPS + 1)


def _rank_main(rank: int, world: int, folder: str, port: int, job: Callable[..., None], given: tuple[Any, ...]) -> None:
    harness._redirect_output(Path(folder) / f"output{rank}.txt")
    os.chdir(folder)
    Path("/proc/self/comm").write_bytes(PROCESS_NAME)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    (Path(folder) / f"started{rank}").touch()
    job(*given)


def run(folder: Path, job: Callable[..., None], *given: Any, world: int = WORLD, wait_s: float = 60.0) -> list[End]:
    """The ends of all ranks, those that end by themselves within `wait_s` of the start of `job(*given)`."""
    with _starting:
        harness._ensure_server()
    context = multiprocessing.get_context("forkserver")
    port = harness.free_port()
    arguments = [(rank, world, str(folder), port, job, given) for rank in range(world)]
    processes: list[Any] = [context.Process(target=_rank_main, args=one) for one in arguments]
    for process in processes:
        process.start()
    while not all((folder / f"started{rank}").exists() for rank in range(world)):
        assert all(process.exitcode is None for process in processes), "it did not start"
        time.sleep(0.02)
    began, seconds = time.monotonic(), [wait_s] * world
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
        ends.append(End(exit_code, seconds[rank], (folder / f"output{rank}.txt").read_text(errors="replace")))
    return ends


@contextmanager
def launched(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    cases: Mapping[str, tuple[int, tuple[Any, ...]]],
) -> Iterator[dict[str, Future[list[End]]]]:
    """Of the cases that the file's chosen tests ask for as `ends`: three at a time, for most of their time is waiting.

    Args:
        cases: name -> how many ranks, and what they run.
    """
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = dict.fromkeys(item.callspec.params["ends"] for item in here if "ends" in item.callspec.params)
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in names}
    with ThreadPoolExecutor(3) as pool:
        yield {name: pool.submit(run, folders[name], *cases[name][1], world=cases[name][0]) for name in names}


def fixtures_of(cases: Mapping[str, tuple[int, tuple[Any, ...]]]) -> tuple[Any, Any]:
    """The fixtures `launches` and `ends` of a test file: `ends` is parametrized indirectly by the name of a case."""

    @pytest.fixture(scope="module")
    def launches(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[dict[str, Future[list[End]]]]:
        with launched(request, tmp_path_factory, cases) as futures:
            yield futures

    @pytest.fixture
    def ends(request: pytest.FixtureRequest, launches: dict[str, Future[list[End]]]) -> list[End]:
        return launches[request.param].result()

    return launches, ends


def _only_stopped_are_left(processes: list[Any]) -> bool:
    left = [p.pid for p in processes if p.exitcode is None]
    try:
        states = [Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] for pid in left]
    except (FileNotFoundError, ProcessLookupError):  # one ended meanwhile
        return False
    return bool(left) and all(state == b"T" for state in states)


def check(
    ends: list[End], survivors: Sequence[int], words: tuple[str, ...], codes: tuple[int, ...] = (EXIT_CODE,)
) -> None:
    """Each of these ranks ended so, with a line that holds all these words."""
    for rank in survivors:
        assert ends[rank].exit_code in codes, f"rank {rank}: {ends[rank]}"
        assert any(all(word in line for word in words) for line in ends[rank].lines), (
            f"rank {rank}: {ends[rank].output}"
        )
