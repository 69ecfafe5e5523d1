"""Runs a function on several gloo ranks of this machine and gives the results back.

    results = run_ranks(train, 2, steps=3)            # [what rank 0 returned, what rank 1 returned]

`fn` is a module-level function. Inside it `torch.distributed` is initialised (a `file://` store, no ports)
and RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, so DeepSpeed adopts
the group as it is. Arguments and results may hold tensors; they travel through files. Every rank starts with
torch, numpy and random seeded alike. A function that calls `pytest.skip` on every rank skips the test.

The processes are forked from a server that has already imported what the tests need (tests/preload.py):
2 ranks with a DeepSpeed engine take 0.25 s, after 4 s for the first launch (measured on 2 cores). The server
is started once per parent process, for the CPU: its children must not touch a GPU. For that use
`start_method="spawn"`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

DEFAULT_TIMEOUT_S = 120.0
# After the first failure the other ranks get this long to report theirs, which are mostly its consequences.
GRACE_S = 0.5
_ROOT = Path(__file__).resolve().parent.parent
_QUIET_ENV = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}


class RankFailedError(RuntimeError):
    """A rank raised, died or ran out of time; the message holds what it said.

    `rank` is the first one that failed, `signal` the number of the signal that ended it (0: none),
    `error_type` the name of the exception's class ("" if it died without one), `timed_out` whether the
    deadline ended the run.
    """

    def __init__(self, message: str, rank: int, error_type: str = "", signal: int = 0, timed_out: bool = False) -> None:
        super().__init__(message)
        self.rank = rank
        self.error_type = error_type
        self.signal = signal
        self.timed_out = timed_out


@dataclass
class Skipped:
    """In the place of a rank's result: it called `pytest.skip` with this reason."""

    reason: str


@dataclass
class _Failure:
    """How a rank failed; `time_s` is CLOCK_MONOTONIC, common to all processes."""

    rank: int
    time_s: float
    error_type: str
    story: str
    signal: int = 0


@dataclass
class _Settings:
    """What a rank is told besides the call; `backend` "" leaves the process group to the function."""

    world_size: int
    backend: str
    timeout_s: float
    environment: dict[str, str]


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    backend: str = "gloo",
    start_method: str = "forkserver",
    init_process_group: bool = True,
    **kwargs: Any,
) -> list[Any]:
    """Calls `fn(*args, **kwargs)` on `world_size` ranks; returns their results in rank order.

    Args:
        fn: module-level function; it asks torch.distributed for its rank.
        timeout_s: wall clock from when the processes are there to the last result.
        backend: of the process group.
        start_method: "forkserver" (CPU) or "spawn" (fresh interpreters: slow, needed for CUDA).
        init_process_group: False leaves that to `fn`; a free MASTER_PORT is set then too.

    Raises:
        RankFailedError: naming the first rank that failed, with its traceback. Only processes started here
            are ended. What the ranks printed goes to this process's output, failed or not.
    """
    if "<locals>" in fn.__qualname__ or "<lambda>" in fn.__qualname__:
        raise ValueError(f"run_ranks needs a module-level function, got {fn.__qualname__}")
    run_dir = Path(tempfile.mkdtemp(prefix="ranks-"))
    try:
        torch.save((fn, args, kwargs), run_dir / "call.pt")
        settings = _Settings(
            world_size=world_size,
            backend=backend if init_process_group else "",
            timeout_s=timeout_s,
            environment=_rank_environment(world_size, start_method),
        )
        context = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            _ensure_server()
        processes = [
            context.Process(target=_rank_main, args=(rank, str(run_dir), settings), name=f"rank{rank}")
            for rank in range(world_size)
        ]
        try:
            with _environment(_QUIET_ENV):
                for process in processes:
                    process.start()  # the first one waits for the server's imports
            timed_out = _wait(processes, run_dir, deadline=time.monotonic() + timeout_s)
            if timed_out:
                _dump_stacks(processes, run_dir)
            exit_codes = [process.exitcode for process in processes]
        finally:
            _end(processes)
        _show_output(run_dir, world_size)
        _raise_first_failure(run_dir, exit_codes, timeout_s if timed_out else None)
        results = [torch.load(run_dir / f"result{rank}.pt", weights_only=False) for rank in range(world_size)]
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
    skips = [rank for rank, result in enumerate(results) if isinstance(result, Skipped)]
    if skips and len(skips) < world_size:
        raise RankFailedError(f"rank {skips[0]} skipped ({results[skips[0]].reason}), others did not", rank=skips[0])
    if skips:
        pytest.skip(results[0].reason)
    return results


# ---------------------------------------------------------------------------------------------- parent


def _ensure_server() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.preload"])
    python_path = os.pathsep.join(filter(None, [str(_ROOT), str(_ROOT / "launchers"), os.environ.get("PYTHONPATH")]))
    with _environment({**_QUIET_ENV, "DS_ACCELERATOR": "cpu", "PYTHONPATH": python_path}):
        forkserver.ensure_running()


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Changes this process's environment for a block."""
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _rank_environment(world_size: int, start_method: str) -> dict[str, str]:
    """The caller's environment as it is now (the server's is older), and what every rank needs."""
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    if start_method == "forkserver":
        environment["DS_ACCELERATOR"] = "cpu"  # chosen when the server imported DeepSpeed
    if sys.platform == "linux":
        # gloo otherwise resolves the host's name, which takes seconds or fails on machines without DNS.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def free_port() -> int:
    """A TCP port of this host that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(processes: list[Any], run_dir: Path, deadline: float) -> bool:
    """Returns when all ranks ended, or shortly after the first failure; True if the deadline came first."""
    while True:
        running = [process for process in processes if process.exitcode is None]
        if not running:
            return False
        now = time.monotonic()
        if now >= deadline:
            return True
        connection.wait([process.sentinel for process in running], timeout=min(0.5, deadline - now))
        failed = any(process.exitcode not in (None, 0) for process in processes)
        if failed or any(run_dir.glob("failure*.pt")):
            grace_end = time.monotonic() + GRACE_S
            for process in processes:
                process.join(max(0.0, grace_end - time.monotonic()))
            return False


def _dump_stacks(processes: list[Any], run_dir: Path) -> None:
    """Has each running rank write where it stands into its stack file, through faulthandler."""
    for rank, process in enumerate(processes):
        if process.exitcode is None and (run_dir / f"stack{rank}.txt").exists():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.3)


def _end(processes: list[Any]) -> None:
    for process in processes:
        if process.pid is not None and process.exitcode is None:
            process.kill()
    for process in processes:
        if process.pid is not None:
            process.join()
            process.close()


def _show_output(run_dir: Path, world_size: int) -> None:
    """Passes the ranks' output on, so that pytest shows it with the test it belongs to."""
    for rank in range(world_size):
        path = run_dir / f"output{rank}.txt"
        text = path.read_text(errors="replace") if path.exists() else ""
        for line in text.splitlines():
            print(f"[rank {rank}] {line}")
    sys.stdout.flush()


def _raise_first_failure(run_dir: Path, exit_codes: list[int | None], timeout_s: float | None) -> None:
    failures = [torch.load(path, weights_only=False) for path in run_dir.glob("failure*.pt")]
    explained = {failure.rank for failure in failures}
    for rank, code in enumerate(exit_codes):
        if code not in (None, 0) and rank not in explained:
            failures.append(_silent_death(run_dir, rank, code))
    if not failures and timeout_s is not None:
        stuck = [rank for rank, code in enumerate(exit_codes) if code is None]
        stacks = [f"rank {rank} was here when time ran out:\n{_stack(run_dir, rank)}" for rank in stuck]
        message = f"ranks {stuck} did not finish within {timeout_s:g} s\n" + "\n\n".join(stacks)
        raise RankFailedError(message, rank=stuck[0] if stuck else 0, timed_out=True)
    if failures:
        failures.sort(key=lambda failure: failure.time_s)
        first = failures[0]
        message = "\n\n".join(f"rank {failure.rank} {failure.story.rstrip()}" for failure in failures)
        raise RankFailedError(message, first.rank, first.error_type, first.signal)


def _silent_death(run_dir: Path, rank: int, code: int) -> _Failure:
    """A rank that ended without raising.

    It comes before those that raised, which did so for the lost connection; but an abort comes last, for that
    is how C++ threads answer the loss of a peer.
    """
    by_signal = max(0, -code)
    how = f"was ended by {signal.Signals(by_signal).name}" if by_signal else f"exited with code {code}"
    stack = _stack(run_dir, rank)
    time_s = float("inf") if by_signal == signal.SIGABRT else 0.0
    return _Failure(rank, time_s, "", f"{how} without raising\n{stack}", by_signal)


def _stack(run_dir: Path, rank: int) -> str:
    path = run_dir / f"stack{rank}.txt"
    return path.read_text() if path.exists() else "(it had not started running yet)"


# ---------------------------------------------------------------------------------------------- rank


def _rank_main(rank: int, run_dir_name: str, settings: _Settings) -> None:
    run_dir = Path(run_dir_name)
    _follow_parent()
    _redirect_output(run_dir / f"output{rank}.txt")
    _trace_on_signals(run_dir / f"stack{rank}.txt")
    try:
        _prepare(rank, settings)
        fn, args, kwargs = torch.load(run_dir / "call.pt", weights_only=False)
        _never_build_shm_op()
        if settings.backend:
            dist.init_process_group(
                settings.backend,
                init_method=f"file://{run_dir}/store",
                rank=rank,
                world_size=settings.world_size,
                # Later than the parent's deadline, which reports where every rank stands, not only one.
                timeout=timedelta(seconds=settings.timeout_s + 60),
            )
        write_whole(run_dir / f"result{rank}.pt", skipped_by(fn, *args, **kwargs))
        _await_others(run_dir, settings.world_size)
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        failure = _Failure(rank, time.monotonic(), type(error).__name__, f"raised:\n{traceback.format_exc()}")
        write_whole(run_dir / f"failure{rank}.pt", failure)
        _flush()
        os._exit(1)  # no teardown: it could wait for peers that are in a collective with this rank
    _flush()


def _trace_on_signals(path: Path) -> None:
    """Has crashes and SIGUSR1 write the Python stack to a file, which exists once the handlers do."""
    part = path.with_suffix(".part")
    stack_file = open(part, "w")  # noqa: SIM115 - open for the process's life
    faulthandler.enable(file=stack_file)
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
    part.rename(path)


def _prepare(rank: int, settings: _Settings) -> None:
    os.environ.clear()
    os.environ.update(settings.environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    seed_everything()


def seed_everything() -> None:
    """The random state that every rank starts from."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def skipped_by(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function returns, or that it skipped."""
    try:
        return fn(*args, **kwargs)
    except pytest.skip.Exception as skip:
        return Skipped(str(skip.msg))


def _follow_parent() -> None:
    """Ends this process when the one that asked for it is gone, however it went."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="follow-parent").start()


def _redirect_output(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    # The server's handlers hold its own streams: after the fork they write to the redirected descriptors.
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), line_buffering=True)


def _never_build_shm_op() -> None:
    """DeepSpeed compiles a CPU shared-memory op in init_distributed (80-130 s) that training never uses."""
    ops = sys.modules.get("deepspeed.ops")
    if ops is not None:
        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def write_whole(path: Path, value: Any) -> None:
    """Saves whole or not at all, so that the parent never reads half a file."""
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.rename(path)


def _await_others(run_dir: Path, world_size: int) -> None:
    """Keeps the connections open until every rank has its result; a failed peer ends the wait."""
    end = time.monotonic() + 10.0
    while time.monotonic() < end:
        if len(list(run_dir.glob("result*.pt"))) == world_size or any(run_dir.glob("failure*.pt")):
            return
        time.sleep(0.01)
