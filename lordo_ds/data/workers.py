"""Processes that each do one task after another, and end with whoever started them, however that ends.

Each has a pipe of its own. Where the parent is killed its end closes, and they leave after the task they are at; where
one of them is killed the parent sees the other end close, and says how.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from lordo_ds.data.corpus import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


def results_of(
    function: Callable[[Task], Result], tasks: Sequence[Task], processes: int
) -> Generator[tuple[int, Result], None, None]:
    """The number of each task and what `function` gave for it, as they are done; the first error ends all.

    Close the iterator (`contextlib.closing`) to have no process left.

    Raises:
        ValueError, OSError: what the function raised.
        RuntimeError: it raised something else; the message is the traceback.
        DataError: a process died.
    """
    # Not fork: torch and numpy may have threads here, and a fork would hold the other processes' pipes open.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    _start_server()
    coming = iter(range(len(tasks)))
    workers: list[Any] = []
    busy: dict[Connection, tuple[Any, int]] = {}
    try:
        for number in coming:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, function), daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
            _give(ours, tasks[number])
            busy[ours] = worker, number
            if len(workers) == processes:
                break
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                worker, number = busy.pop(pipe)
                result = _answer(pipe, worker)
                following = next(coming, None)
                if following is None:
                    pipe.close()
                else:
                    _give(pipe, tasks[following])
                    busy[pipe] = worker, following
                yield number, result
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _start_server() -> None:
    """Start the server that forks the processes, so that it ignores SIGINT from its first instruction.

    By itself it does so after it has imported what it preloads, which takes seconds; a Ctrl-C in them would print its
    traceback. What is ignored stays so in a new program.
    """
    if threading.current_thread() is not threading.main_thread():
        forkserver.ensure_running()  # only the main thread may change handlers
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _give(pipe: Connection, task: object) -> None:
    with suppress(BrokenPipeError):  # it is gone: the answer will say so
        pipe.send(task)


def _answer(pipe: Connection, worker: Any) -> Any:
    try:
        succeeded, answer = pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.join()
        how = f"by signal {-worker.exitcode}" if worker.exitcode < 0 else f"with exit code {worker.exitcode}"
        raise DataError(
            f"a process ended {how} in the middle of its work; what it said stands above; where memory is short give "
            "fewer --workers; the same command goes on"
        ) from None
    if not succeeded:
        raise answer
    return answer


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent ends us
    while True:
        try:
            task = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        answer: tuple[bool, Any]
        try:
            answer = True, function(task)
        except (ValueError, OSError) as error:
            answer = False, error
        except Exception:
            answer = False, RuntimeError(traceback.format_exc())
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return
