"""A thread beside the one that trains, for a sync that training does not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.replica.copies import TiedWeight

_T = TypeVar("_T")


@dataclass(frozen=True)
class BackgroundGroups:
    """The groups of `connect` once more, in process groups of their own: a sync may run in these beside training."""

    wire: ReplicaWire
    inside: InsideReplica
    tied: Sequence[TiedWeight] = ()


class Background(Generic[_T]):
    """Runs one job at a time. On an accelerator it works in a stream of its own, after what was begun before it.

    The thread lives as long as its job, and the interpreter waits for it: all ranks began it, so all can end it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ended: Any = None
        self._thread: threading.Thread | None = None
        self._result: _T | None = None
        self._error: BaseException | None = None

    @property
    def thread(self) -> int | None:
        """The identifier of the thread that works, or has worked."""
        return None if self._thread is None else self._thread.ident

    @property
    def busy(self) -> bool:
        """A job was started, and its result has not been asked for."""
        return self._thread is not None

    def start(self, job: Callable[[], _T]) -> None:
        """The job must not touch what the calling thread changes before `result`."""
        assert not self.busy
        began = None
        if self._stream is not None:
            began = torch.cuda.Event()
            began.record(torch.cuda.current_stream(self.device))
        self._result, self._error = None, None
        arguments = (job, began, torch.get_num_threads())
        self._thread = threading.Thread(target=self._run, args=arguments, name="lordo-sync")
        self._thread.start()

    def _run(self, job: Callable[[], _T], began: Any, threads: int) -> None:
        try:
            torch.set_num_threads(threads)  # OpenMP's is a thread's own: sums must round as in the other threads
            with torch.no_grad():
                if self._stream is None:
                    self._result = job()
                    return
                torch.cuda.set_device(self.device)
                with torch.cuda.stream(self._stream):
                    self._stream.wait_event(began)
                    self._result = job()
                    self._ended = torch.cuda.Event()
                    self._ended.record(self._stream)
        except BaseException as error:  # raised where the result is asked for
            self._error = error

    def wait(self) -> None:
        """Until the job has ended, well or not; what the device still has to do of it comes before what follows."""
        if self._thread is not None:
            self._thread.join()
            if self._ended is not None:
                torch.cuda.current_stream(self.device).wait_event(self._ended)

    def result(self) -> _T:
        """What the job returned, once; or its error, raised here."""
        self.wait()
        self._thread = self._ended = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        result, self._result = self._result, None
        return result  # type: ignore[return-value]
