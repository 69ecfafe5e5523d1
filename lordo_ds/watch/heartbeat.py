"""One rank's voice and ear in the key-value store of the process group."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from lordo_ds.watch.last_words import say_unwatched
from lordo_ds.watch.liveness import DEAF, LEFT, LOAD, SAVE, Peer, Report, decode_process, decode_report, encode
from lordo_ds.watch.process import Process
from lordo_ds.watch.timeouts import collectives_begun
from lordo_ds.watch.whereabouts import bytes_read_and_written, whereabouts

_LONGEST_BEAT_S = 5.0
_FAREWELL_S = 3.0


class Heartbeat(threading.Thread):
    """A thread that publishes this rank's reports and reads those of the others, every `beat_s`.

    It alone touches its store: when the server is frozen, a client is blocked beyond any timeout (torch 2.13). Others
    read its attributes: `peers`; `heard`, a count of exchanges, and `heard_from`, when the last of them began; `error`,
    why there will be no more of them; `failed`, by a fault of this thread, not of the store; `motion`, which changes
    when the main thread goes on or a collective begins; `verdict`, why the run ends, as the first rank that found it
    put it.

    Args:
        timeout_s: how long a rank may be silent.

    Raises:
        RuntimeError: the process group has no store.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__(name="lordo-heartbeat", daemon=True)
        self.rank, world = dist.get_rank(), dist.get_world_size()
        self.beat_s = self._beat_s(timeout_s)
        self.process = Process.this()
        self.main_thread, self._native_thread = threading.get_ident(), threading.get_native_id()
        self._groups: Sequence[str] = ()
        self.report = Report(replica=self.rank)
        self.motion: object = None
        self.begun = 0
        self.peers = [Peer(rank) for rank in range(world) if rank != self.rank]
        self.heard, self.heard_from = 0, -math.inf
        self.error = self.verdict = ""
        self.failed = False
        self.holds_store = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.at_end: Callable[[], object] = lambda: None  # called by the thread, when it has ended in order
        self._ending = self._leaving = False
        self._wake, self._quit, self._lock = threading.Event(), threading.Event(), threading.Lock()
        store: Any = distributed_c10d._get_default_store()
        store = store.clone()  # may be used beside the original, from another thread
        # Each rank counts its own heartbeats in this process group: all create them at the same points.
        count = store.add(f"lordo/heartbeats_of/{self.rank}", 1)
        self._store: Any = distributed_c10d.PrefixStore(f"lordo/heartbeat/{count}", store)

    @staticmethod
    def _beat_s(timeout_s: float) -> float:
        return min(timeout_s / 10, max(_LONGEST_BEAT_S, dist.get_world_size() / 100))

    def follow(self, replica: int, groups: Sequence[str], timeout_s: float) -> None:
        """The first rank of this one's replica, the names of the process groups inside it, and what they allow."""
        self._groups, self.beat_s = groups, self._beat_s(timeout_s)
        self.tell(replica=replica)
        self.ask()

    def follow_this_thread(self) -> None:
        """The calling thread is the one that trains."""
        self.main_thread, self._native_thread = threading.get_ident(), threading.get_native_id()

    def tell(self, **facts: int | str | dict[str, int]) -> None:
        """Change what this rank's next beats say. From any thread."""
        with self._lock:
            self.report = replace(self.report, **facts)  # type: ignore[arg-type]

    def ask(self) -> None:
        """Exchange at once."""
        self._wake.set()

    def publish_verdict(self, reason: str) -> None:
        """Make it every rank's, unless another came first; `verdict` then holds the one that did."""
        self.verdict = self.verdict or reason
        self._wake.set()

    def end(self, why: str) -> None:
        """Publish why no more beats will come, and stop; where the store is, once the others have ended too."""
        self.tell(ended=why)
        self._ending = True
        self._wake.set()

    def leave(self) -> None:
        """This process ends, after `end`. The store goes with it: first the others may read that it left in order."""
        self._leaving = True
        self._wake.set()
        self.join(_FAREWELL_S if self.report.ended == LEFT else 2 * self.beat_s)
        self._quit.set()
        self._wake.set()
        self.join(1.0)

    def run(self) -> None:
        try:
            self._store.set(f"process/{self.rank}", encode(self.process))
            last = time.monotonic()
            while not self._ending:
                last = self._exchange(last)
                self._wake.wait(self.beat_s)
                self._wake.clear()
            last = self._exchange(last)
            pause = 0.05  # the others mostly end within moments
            while self.holds_store and not (self._quit.is_set() or self._others_ended()):
                self._wake.wait(min(0.1 if self._leaving else pause, self.beat_s))
                self._wake.clear()
                pause *= 2
                last = self._exchange(last)
        except (RuntimeError, OSError) as error:  # the store's: the run may end well without it
            self.error = str(error).partition("\n")[0] or type(error).__name__
        except Exception as error:  # ours: a thread must not end in silence
            self._fail(error)
        finally:
            self._store = None  # closes its connection: this object may outlive the thread by far
            if self._ending:
                self.at_end()

    def _fail(self, error: Exception) -> None:
        """The run goes on; that nobody watches this rank any more is said here, and to the others."""
        self.failed, self.error = True, f"{type(error).__name__}: {error}"
        say_unwatched("heartbeat", self.rank, error)
        try:
            self.tell(ended=DEAF)
            self._store.set(f"report/{self.rank}", encode(self.report))
        except (RuntimeError, OSError):
            pass  # then the others will call it silent

    def _look_around(self) -> None:
        here, begun = whereabouts(self.main_thread), collectives_begun()
        inside = {name: begun[name] for name in self._groups if name in begun}
        self.tell(beat=self.report.beat + 1, place=here.place, waits=here.waits, begun=inside)
        # Only a save or a load is judged by its files, and files are read only then.
        moved = bytes_read_and_written(self._native_thread) if self.report.block in (SAVE, LOAD) else 0
        self.begun = sum(begun.values())
        self.motion = (here.motion, moved)

    def _others_ended(self) -> bool:
        return all(peer.ended or peer.is_lost(self.process) for peer in self.peers)

    def _exchange(self, last: float) -> float:
        now = time.monotonic()
        self._look_around()
        self._store.set(f"report/{self.rank}", encode(self.report))
        # One that was suspended itself must not count that time against the others.
        elapsed = min(now - last, 10 * self.beat_s)
        for peer, text in zip(self.peers, self._read_reports(), strict=True):
            peer.hear(None if text is None else decode_report(text), elapsed)
            if text is not None and not peer.process.pid:
                peer.process = decode_process(self._store.get(f"process/{peer.rank}"))
        if self.verdict or self._store.check(["verdict"]):
            self.verdict = self._store.compare_set("verdict", "", self.verdict).decode()
        self.heard_from = now
        self.heard += 1
        return now

    def _read_reports(self) -> list[bytes | None]:
        """Those of all peers, in one request once all have begun; `get` would wait for the missing ones."""
        keys = [f"report/{peer.rank}" for peer in self.peers]
        if not self._store.check(keys):
            return [self._store.get(key) if self._store.check([key]) else None for key in keys]
        return list(self._store.multi_get(keys)) if self._store.has_extended_api() else list(map(self._store.get, keys))
