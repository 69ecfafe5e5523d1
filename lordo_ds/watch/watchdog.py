"""Ends the job, and says which rank is to blame, when a process is dead, frozen or stuck.

Without it a collective whose partner is gone waits for ever with NCCL, and for half an hour with gloo.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.util import Finalize

import torch.distributed as dist

from lordo_ds.watch.broken_connections import first_line, gist, lost_connection, timed_out
from lordo_ds.watch.followed import Followed, FollowedReplica, Ledger
from lordo_ds.watch.heartbeat import Heartbeat
from lordo_ds.watch.last_words import flush, say, say_unwatched
from lordo_ds.watch.liveness import (
    END,
    FLIGHT,
    LEFT,
    START,
    Finding,
    Patience,
    Stall,
    what_is_wrong,
    who_holds_up,
    who_left,
    why_a_collective_failed,
    why_it_ends,
)
from lordo_ds.watch.timeouts import Limits, limits_of_groups, same_ranks, timeout_of
from lordo_ds.watch.unwatched import Unwatched

logger = logging.getLogger("lordo_ds")
_watching: weakref.WeakSet[Watchdog] = weakref.WeakSet()

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: trying again may help
EXIT_CODE_AGAIN_THE_SAME = 65  # EX_DATAERR: it would end like this again
_SOON_S = 0.05


def watch_ranks(timeout_s: float, owner: object) -> Watchdog | Unwatched:
    """A watchdog for as long as the owner lives and does not stop it; all ranks call this at the same point."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Unwatched()
    try:
        watchdog = Watchdog(timeout_s)
    except (RuntimeError, AttributeError, NotImplementedError) as error:  # a backend such as MPI has no store
        logger.warning("LoRDO: nobody watches for dead or frozen processes: %s", str(error).partition("\n")[0])
        return Unwatched()
    weakref.finalize(owner, watchdog.stop).atexit = False  # the watchdog sees to that itself
    _watching.add(watchdog)
    return watchdog


def tell_the_others(error: BaseException) -> None:
    """That this process ends with this error, before it does so by `os._exit`, as nobody is told of otherwise."""
    for watchdog in list(_watching):
        watchdog.stop(f"{type(error).__name__}: {first_line(error)}")
        watchdog._heartbeat.leave()


class Watchdog(Unwatched):
    """Judges, in a thread that nothing blocks, what the heartbeat thread hears from the other ranks."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._limits = Limits.of(timeout_s, timeout_of(dist.group.WORLD) or math.inf)
        self._ledgers: list[Ledger] = []
        self._heartbeat = Heartbeat(self._limits.step_s)
        self._pid = os.getpid()
        self._before_first_step = True
        self._stall, self._deaf_s = Stall(), 0.0
        self._suspects_since: float | None = None
        self._stopped, self._ending = threading.Event(), threading.Lock()
        self._judge = threading.Thread(target=self._watch, name="lordo-watchdog", daemon=True)
        # Unlike atexit, this runs in the children of multiprocessing too.
        self._at_exit = Finalize(None, self._leave, exitpriority=100)
        self._heartbeat.at_end = self._at_exit.cancel  # nothing is left to do: it would only keep this object
        self._heartbeat.start()
        self._judge.start()

    # -- what the main thread says -------------------------------------------------------------------

    def follow(self, wire: Followed, inside: FollowedReplica, beside: Sequence[Followed] = ()) -> None:
        """The groups that the ranks wait for each other in, and those for what goes on beside training."""
        comms = [wire, inside.shard, inside.tensor, inside.everyone, inside.rows, *beside]
        self._limits = limits_of_groups(self._timeout_s, [comm.group for comm in comms])
        self._ledgers = [comm.ledger for comm in comms]
        inner = [comm.group for comm in comms[1:5] if comm.group is not None]
        replica = min([dist.get_rank(), *(rank for group in inner for rank in dist.get_process_group_ranks(group))])
        names = same_ranks([inside.shard.group, inside.rows.group, inside.tensor.group])
        self._heartbeat.follow(replica, names, self._limits.step_s)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """The block makes the ranks ready for the first step. An exception that leaves it ends the watch too."""
        try:
            with self.during(START):
                yield
        except Exception as error:
            self.stop(f"{type(error).__name__}: {first_line(error)}")
            raise

    @contextmanager
    def at_the_end_of(self, step: int) -> Iterator[None]:
        """The block holds the collectives that all ranks enter at the end of this attempted step."""
        with self.during(END, step=step):
            yield
        self._before_first_step = False

    @contextmanager
    def during(self, block: str, **facts: int) -> Iterator[None]:
        """The block holds collectives that all ranks enter, of this kind; see `lordo_ds.watch.liveness`.

        Where one of them fails because a process is gone, this one ends too, and says so.
        """
        before = self._heartbeat.report.block
        self._heartbeat.follow_this_thread()
        self._heartbeat.tell(block=block, **facts)
        try:
            yield
        except RuntimeError as error:
            finding = self._why_it_failed(error) if lost_connection(error) else Finding()
            if finding.reason:
                self._end(self._verdict(finding._replace(reason=f"{finding.reason} ({gist(error)})")))
            raise
        finally:
            self._heartbeat.tell(block=before)

    @contextmanager
    def in_flight(self, thread: int | None) -> Iterator[None]:
        """The block waits for a thread of this process, among collectives that all ranks have begun beside training."""
        with self.during(FLIGHT):
            self._heartbeat.main_thread = thread or self._heartbeat.main_thread
            try:
                yield
            finally:
                self._heartbeat.follow_this_thread()

    def synced(self, step: int) -> None:
        """This step ended in a sync."""
        self._heartbeat.tell(synced=step)

    def resumed(self, step: int, synced: int) -> None:
        """A load brought these counters: of the last step, and the last that ended in a sync."""
        self._heartbeat.tell(step=step, synced=synced)

    @property
    def stopped(self) -> bool:  # type: ignore[override]
        return self._stopped.is_set()

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
        if not self._heartbeat.is_alive():
            self._at_exit.cancel()  # nothing is left to say, or to keep in memory

    def _leave(self) -> None:
        """The program ends; an exception that ends it is the interpreter's last, or on its way (multiprocessing)."""
        if os.getpid() != self._pid:
            return
        if not self._stopped.is_set() and not self._ending.acquire(blocking=False):
            time.sleep(60.0)  # the judge is ending the process, with its own words and exit code
        error = sys.exc_info()[1] or getattr(sys, "last_value", None)
        ended_by_error = error is not None and not (isinstance(error, SystemExit) and not error.code)
        if isinstance(error, RuntimeError) and lost_connection(error) and not self._stopped.is_set():
            finding = self._why_it_failed(error)  # in a collective of the engine's
            if finding.reason:
                verdict = self._verdict(finding._replace(reason=f"{finding.reason} ({gist(error)})"))
                self._heartbeat.publish_verdict(verdict)  # what the others will wait for is not this rank's fault
                say(self._line(verdict) + ".")
        self.stop(f"{type(error).__name__}: {first_line(error)}" if ended_by_error else LEFT)
        self._heartbeat.leave()

    # -- the thread that judges ----------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            self._judge_until_stopped()
        except Exception as error:  # a thread must not end in silence
            say_unwatched("watchdog", self._heartbeat.rank, error)

    def _judge_until_stopped(self) -> None:
        last, heard = time.monotonic(), -1
        progress: object = None
        motion: object = None
        while not self._stopped.wait(self._tick_s if self._suspects_since is None else _SOON_S):
            heartbeat = self._heartbeat
            now = time.monotonic()
            # One that was suspended itself must not count that time against the others.
            elapsed, last = min(now - last, 10 * self._tick_s), now
            before, progress = progress, (heartbeat.report.step, heartbeat.report.block, self._progress_now())
            moved, motion = motion, heartbeat.motion
            self._stall = Stall(
                self._stall.waited_s + elapsed if progress == before else 0.0,
                self._stall.still_s + elapsed if (progress, motion) == (before, moved) else 0.0,
            )
            was_heard, heard = heard, heartbeat.heard
            self._deaf_s = self._deaf_s + elapsed if heard == was_heard else 0.0
            if heartbeat.failed or (
                self._is_deaf() and any(p.rank == 0 and (p.left or p.deaf) for p in heartbeat.peers)
            ):
                return  # it has said so; or rank 0 took the store along, in order
            verdict = self._why_it_ends()
            if verdict:
                self._end(verdict)

    def _why_it_ends(self) -> str:
        """A verdict, or ""."""
        heartbeat = self._heartbeat
        if heartbeat.verdict:
            return heartbeat.verdict
        if self._is_deaf():
            return self._verdict(Finding(self._deafness()))
        if heartbeat.error or self._deaf_s > 2.5 * heartbeat.beat_s:
            return ""  # what is known of the others is old
        finding = why_it_ends(
            heartbeat.report, heartbeat.rank, self._stall, heartbeat.peers, heartbeat.process, self._patience
        )
        if not finding.reason:
            self._suspects_since = None
            return ""
        # That a process has ended is seen at once, but what it said last is read with the next beat.
        if self._suspects_since is None:
            self._suspects_since = time.monotonic()
            heartbeat.ask()
        return self._verdict(finding) if heartbeat.heard_from > self._suspects_since else ""

    @property
    def _tick_s(self) -> float:
        return min(1.0, self._limits.step_s / 20)

    @property
    def _patience(self) -> Patience:
        return Patience.of(self._limits, self._before_first_step)

    def _progress_now(self) -> tuple[int, int]:
        try:
            return sum(ledger.total_bytes for ledger in self._ledgers), self._heartbeat.begun
        except RuntimeError:  # a dictionary grew in the main thread: something is going on
            return -1, -1

    def _is_deaf(self) -> bool:
        if self._heartbeat.error and self._heartbeat.report.block and self._stall.waited_s > self._patience.lost_s:
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

    def _why_it_failed(self, error: RuntimeError) -> Finding:
        """After a failed collective: known at once of ranks on this host, and after some beats of others."""
        heartbeat = self._heartbeat
        began, found = time.monotonic(), math.inf
        while time.monotonic() - began < 4 * heartbeat.beat_s and not heartbeat.failed:
            finding = why_a_collective_failed(
                heartbeat.report, heartbeat.peers, heartbeat.process, 2.5 * heartbeat.beat_s
            )
            if finding.reason and heartbeat.heard_from > found:
                return finding
            # A process that has ended may have told why: what it said last has not been read yet.
            found = min(found, time.monotonic()) if finding.reason else math.inf
            if heartbeat.error:
                return Finding(self._deafness())
            heartbeat.ask()
            time.sleep(min(_SOON_S, self._tick_s))
        me, left = heartbeat.report, [peer for peer in heartbeat.peers if peer.left]
        if timed_out(error):
            return who_holds_up(me, self._stall.waited_s, heartbeat.peers, heartbeat.process, self._patience.silent_s)
        return who_left(me, left) if left else Finding()

    def _verdict(self, finding: Finding) -> str:
        return json.dumps([self._heartbeat.rank, *finding])

    def _line(self, verdict: str) -> str:
        heartbeat = self._heartbeat
        rank, reason, again = json.loads(verdict)
        found = "" if rank == heartbeat.rank else f" (found by rank {rank})"
        synced = f"step {heartbeat.report.synced}" if heartbeat.report.synced else "none"
        advice = "Restart from the last checkpoint" if again else "A restart would end in the same"
        return (
            f"LoRDO: {reason}{found}. Last completed sync: {synced}; rank {heartbeat.rank} is at step "
            f"{heartbeat.report.step}. {advice}"
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
        exit_code = EXIT_CODE if json.loads(heartbeat.verdict)[2] else EXIT_CODE_AGAIN_THE_SAME
        say(f"{self._line(heartbeat.verdict)}; ending it with exit code {exit_code}.")
        if not heartbeat.error:
            time.sleep(2 * heartbeat.beat_s)
        flush()
        os._exit(exit_code)
