"""Ends the job, and says which rank is to blame, when a process is dead, frozen or stuck.

Without it a collective whose partner is gone waits for ever with NCCL, and for half an hour with gloo.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize

import torch.distributed as dist

from lordo_ds.dist.heartbeat import Heartbeat
from lordo_ds.dist.liveness import LEFT, Patience, what_is_wrong, why_it_ends
from lordo_ds.dist.wire import SyncError

logger = logging.getLogger("lordo_ds")

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: trying again may help


class Unwatched:
    """Does nothing: this rank is alone, or its process group has no key-value store."""

    @contextmanager
    def at_the_end_of(self, step: int) -> Iterator[None]:
        yield

    def synced(self, step: int) -> None:
        pass

    def stop(self, why: str = LEFT) -> None:
        pass


def watch_ranks(timeout_s: float, progress: Callable[[], int], owner: object) -> Watchdog | Unwatched:
    """A watchdog for as long as the owner lives and does not stop it; all ranks call this at the same point.

    Args:
        progress: a number that changes whenever a collective ends; another thread calls it. It must not hold on to
            the owner.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Unwatched()
    try:
        watchdog = Watchdog(timeout_s, progress)
    except (RuntimeError, AttributeError, NotImplementedError) as error:  # a backend such as MPI has no store
        logger.warning("LoRDO: nobody watches for dead or frozen processes: %s", str(error).partition("\n")[0])
        return Unwatched()
    weakref.finalize(owner, watchdog.stop).atexit = False  # the watchdog sees to that itself
    return watchdog


class Watchdog(Unwatched):
    """Judges, in a thread that nothing blocks, what the heartbeat thread hears from the other ranks."""

    def __init__(self, timeout_s: float, progress: Callable[[], int]) -> None:
        self._timeout_s, self._progress = timeout_s, progress
        self._tick_s = min(1.0, timeout_s / 20)
        self._heartbeat = Heartbeat(timeout_s)
        self._pid = os.getpid()
        self._before_first_step = True
        self._waited_s = self._deaf_s = 0.0
        self._stopped, self._ending = threading.Event(), threading.Lock()
        self._judge = threading.Thread(target=self._watch, name="lordo-watchdog", daemon=True)
        # Unlike atexit, this runs in the children of multiprocessing too.
        self._at_exit = Finalize(None, self._leave, exitpriority=100)
        self._heartbeat.at_end = self._at_exit.cancel  # nothing is left to do: it would only keep this object
        self._heartbeat.start()
        self._judge.start()

    # -- what the main thread says -------------------------------------------------------------------

    @contextmanager
    def at_the_end_of(self, step: int) -> Iterator[None]:
        """The block holds the collectives that all ranks enter at the end of this attempted step.

        Where one of them fails because a process is gone, this one ends too, and says so.
        """
        self._heartbeat.main_thread = threading.get_ident()
        self._heartbeat.tell(step=step, inside=True)
        try:
            yield
        except RuntimeError as error:
            lost = self._who_is_lost() if _lost_connection(error) else ""
            if lost:
                self._end(self._verdict(f"{lost} ({_gist(error)})"))
            raise
        finally:
            self._heartbeat.tell(inside=False)
        self._before_first_step = False

    def synced(self, step: int) -> None:
        """This step ended in a sync."""
        self._heartbeat.tell(synced=step)

    def stop(self, why: str = LEFT) -> None:
        """Tell the other ranks that no more beats will come, and judge no more."""
        if self._stopped.is_set() or os.getpid() != self._pid:  # a forked child has a copy without threads
            return
        self._stopped.set()
        self._heartbeat.end(why)
        if threading.current_thread() not in (self._heartbeat, self._judge):
            self._judge.join(timeout=1.0)
            if not self._heartbeat.holds_store:
                self._heartbeat.join(timeout=1.0)

    def _leave(self) -> None:
        """The program ends; an exception that ends it is the interpreter's last, or on its way (multiprocessing)."""
        if os.getpid() != self._pid:
            return
        error = sys.exc_info()[1] or getattr(sys, "last_value", None)
        ended_by_error = error is not None and not (isinstance(error, SystemExit) and not error.code)
        if isinstance(error, RuntimeError) and _lost_connection(error) and not self._stopped.is_set():
            lost = self._who_is_lost()  # in a collective of the engine's
            _say(self._line(f"{lost} ({_gist(error)})") + "." if lost else "")
        self.stop(f"{type(error).__name__}: {_first_line(error)}" if ended_by_error else LEFT)
        self._heartbeat.leave()

    # -- the thread that judges ----------------------------------------------------------------------

    def _watch(self) -> None:
        last, heard, progress = time.monotonic(), -1, -1
        while not self._stopped.wait(self._tick_s):
            now = time.monotonic()
            # One that was suspended itself must not count that time against the others.
            elapsed, last = min(now - last, 10 * self._tick_s), now
            before, progress = progress, self._progress_now()
            waits = self._heartbeat.report.inside and progress == before
            self._waited_s = self._waited_s + elapsed if waits else 0.0
            before, heard = heard, self._heartbeat.heard
            self._deaf_s = self._deaf_s + elapsed if heard == before else 0.0
            if self._is_deaf() and any(peer.rank == 0 and peer.left for peer in self._heartbeat.peers):
                return  # it took the store along, in order
            reason = self._why_it_ends()
            if reason:
                self._end(reason)

    def _why_it_ends(self) -> str:
        """A verdict, or ""."""
        heartbeat = self._heartbeat
        if heartbeat.verdict:
            return heartbeat.verdict
        if self._is_deaf():
            return self._verdict(self._deafness())
        if heartbeat.error or self._deaf_s > 2.5 * heartbeat.beat_s:
            return ""  # what is known of the others is old
        reason = why_it_ends(heartbeat.report, self._waited_s, heartbeat.peers, heartbeat.process, self._patience)
        return self._verdict(reason) if reason else ""

    @property
    def _patience(self) -> Patience:
        return Patience.of(self._timeout_s, self._before_first_step)

    def _progress_now(self) -> int:
        try:
            return self._progress()
        except RuntimeError:  # a dictionary grew in the main thread: something is going on
            return -1

    def _is_deaf(self) -> bool:
        if self._heartbeat.error and self._heartbeat.report.inside and self._waited_s > self._patience.lost_s:
            return True
        # An exchange is due every beat: silence begins with the next.
        return self._deaf_s > self._patience.silent_s + self._heartbeat.beat_s

    def _deafness(self) -> str:
        heartbeat = self._heartbeat
        holder = "this rank" if heartbeat.holds_store else "rank 0, or the launcher's agent on its node,"
        how = f"is gone ({heartbeat.error})" if heartbeat.error else f"has not answered for {self._deaf_s:.0f} s"
        store = f"the process group's key-value store, which {holder} holds, {how}"
        odd = [p for p in heartbeat.peers if p.is_lost(heartbeat.process) or p.process.state(heartbeat.process)]
        known = [what_is_wrong(peer, heartbeat.process) for peer in odd]
        return "; ".join([*known, store]) if known else f"{store}: that process is dead, frozen or cut off"

    def _who_is_lost(self) -> str:
        """After a failed collective: who is gone, known at once on this host, and after some beats on others."""
        heartbeat = self._heartbeat
        began = time.monotonic()
        while time.monotonic() - began < 4 * heartbeat.beat_s:
            lost = [p for p in heartbeat.peers if p.is_lost(heartbeat.process) or p.silent_s > 2.5 * heartbeat.beat_s]
            if lost:
                return "; ".join(what_is_wrong(peer, heartbeat.process) for peer in lost)
            if heartbeat.error:
                return self._deafness()
            time.sleep(min(0.1, self._tick_s))
        return ""

    def _verdict(self, reason: str) -> str:
        return json.dumps([self._heartbeat.rank, reason])

    def _line(self, reason: str) -> str:
        report = self._heartbeat.report
        synced = f"step {report.synced}" if report.synced else "none"
        return (
            f"LoRDO: {reason}. Last completed sync: {synced}; rank {self._heartbeat.rank} is at step {report.step}. "
            "Restart from the last checkpoint"
        )

    def _end(self, verdict: str) -> None:
        """Say why on stderr and end the process, once the other ranks had the time to read it too."""
        if self._stopped.is_set():
            return
        self._ending.acquire()  # for good: one of the two threads ends the process
        heartbeat = self._heartbeat
        heartbeat.publish_verdict(verdict)
        told, until = heartbeat.heard + 1, time.monotonic() + 1.0
        while heartbeat.heard <= told and time.monotonic() < until and not heartbeat.error:
            time.sleep(0.05)
        rank, reason = json.loads(heartbeat.verdict)
        found = "" if rank == heartbeat.rank else f" (found by rank {rank})"
        _say(f"{self._line(reason + found)}; ending it with exit code {EXIT_CODE}.")
        if not heartbeat.error:
            time.sleep(2 * heartbeat.beat_s)
        _flush_within(1.0)
        os._exit(EXIT_CODE)


def _lost_connection(error: RuntimeError) -> bool:
    if isinstance(error, SyncError):
        return False
    # gloo's own errors carry the path of its source.
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]


def _gist(error: RuntimeError) -> str:
    """gloo's message without the place in its source and the advice."""
    return re.sub(r"^\[[^]]*\] ", "", _first_line(error)).partition(". ")[0]


def _say(line: str) -> None:
    """Not through sys.stderr, whose lock the main thread may hold."""
    if line:
        os.write(2, f"{line}\n".encode())


def _flush_within(seconds: float) -> None:
    """Flush what was printed; a thread that holds a stream's lock must not keep the process alive."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()

    flusher = threading.Thread(target=flush, daemon=True)
    flusher.start()
    flusher.join(seconds)
