"""What the ranks of a run tell each other about themselves, and when that means that the run cannot go on.

Nothing here communicates or waits: `lordo_ds.dist.heartbeat` and `lordo_ds.dist.watchdog` do.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

LEFT = "left"  # `Report.ended` of a rank that closed its optimizer, or came to the end of its program


@dataclass(frozen=True)
class Report:
    """One heartbeat of one rank.

    `beat` changes from one to the next. `step` is the last attempted step, `synced` the last that ended in a sync.
    `inside`: it is among the collectives that end `step`. `place` is where its main thread is. `ended` says why no
    more beats will come, "" while they will.
    """

    beat: int = 0
    step: int = 0
    synced: int = 0
    inside: bool = False
    place: str = ""
    ended: str = ""

    @property
    def progress(self) -> tuple[int, bool]:
        """Grows as the rank goes on."""
        return self.step, self.inside


@dataclass(frozen=True)
class Process:
    """A process, as others on its host find it; `host` tells hosts and containers apart, "" where that is unknown."""

    host: str = ""
    pid: int = 0
    started: str = ""

    @classmethod
    def this(cls) -> Process:
        try:
            host = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
            return cls(host, os.getpid(), _stat(os.getpid())[1])
        except OSError:  # not Linux
            return cls()

    def state(self, observer: Process) -> str:
        """How the process is, seen from the observer's host: "gone", "stopped", or "" (running, or out of sight)."""
        if not self.host or self.host != observer.host:
            return ""
        try:
            state, started = _stat(self.pid)
        except OSError:
            return "gone"
        if started != self.started or state in "ZX":
            return "gone"
        return "stopped" if state in "Tt" else ""


def _stat(pid: int) -> tuple[str, str]:
    """State letter and start time of a process; its name, before them, may hold blanks and brackets."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


def encode(value: Report | Process) -> str:
    return json.dumps(asdict(value))


def decode_report(text: bytes) -> Report:
    return Report(**json.loads(text))


def decode_process(text: bytes) -> Process:
    return Process(**json.loads(text))


@dataclass
class Peer:
    """What one rank knows of another; `silent_s` is how long its beat has not changed, by the observer's clock."""

    rank: int
    process: Process = field(default_factory=Process)
    report: Report | None = None
    silent_s: float = 0.0

    def hear(self, report: Report | None, elapsed_s: float) -> None:
        changed = report is not None and (self.report is None or report.beat != self.report.beat)
        self.silent_s = 0.0 if changed else self.silent_s + elapsed_s
        self.report = report or self.report

    @property
    def left(self) -> bool:
        return self.report is not None and self.report.ended == LEFT

    @property
    def ended(self) -> bool:
        return self.report is not None and bool(self.report.ended)

    def is_lost(self, observer: Process) -> bool:
        """Whether it certainly sends nothing any more, and did not leave in order."""
        return not self.left and (self.ended or self.process.state(observer) == "gone")


@dataclass(frozen=True)
class Patience:
    """Seconds: with a silent rank, with a collective that does not end, and with a rank that is lost for certain."""

    silent_s: float
    stuck_s: float
    lost_s: float

    @classmethod
    def of(cls, timeout_s: float, before_first_step: bool) -> Patience:
        """The first step compiles and reads data: there, only silence counts."""
        return cls(timeout_s, math.inf if before_first_step else timeout_s, min(2.0, timeout_s / 2))


def why_it_ends(me: Report, waited_s: float, peers: Sequence[Peer], observer: Process, patience: Patience) -> str:
    """Why this rank must not go on, naming the ranks to blame; "" as long as it may.

    A rank that is lost matters to whoever waits for it in a collective; elsewhere only once it has been silent for
    long, because it may have done all it had to do. A rank that left in order is blamed only by those who wait.

    Args:
        waited_s: how long this rank has been among the collectives that end a step without one of them ending.
    """
    blamed = [peer for peer in peers if not peer.left and peer.silent_s > patience.silent_s]
    if me.inside and waited_s > patience.lost_s:
        blamed = [peer for peer in peers if peer in blamed or peer.is_lost(observer)]
    if blamed:
        return "; ".join(what_is_wrong(peer, observer) for peer in blamed)
    if not me.inside or waited_s <= patience.stuck_s:
        return ""
    behind = [peer for peer in peers if peer.left or peer.report is None or peer.report.progress < me.progress]
    if not behind:
        return f"all ranks have been among the collectives that end step {me.step} for {waited_s:.0f} s"
    # A rank that says nothing either is on its way to being called silent.
    quiet = [peer for peer in behind if not peer.left and peer.silent_s > patience.silent_s / 2]
    told = [what_is_wrong(peer, observer) if peer in quiet else _where_it_is(peer) for peer in behind]
    return f"waited {waited_s:.0f} s at the end of step {me.step}: " + "; ".join(told)


def what_is_wrong(peer: Peer, observer: Process) -> str:
    """One clause on a rank that is lost or silent."""
    state = peer.process.state(observer)
    if peer.ended and not peer.left:
        assert peer.report is not None
        return f"rank {peer.rank} ended with {peer.report.ended}"
    if state == "gone":
        return f"rank {peer.rank} is gone: process {peer.process.pid} was killed, or ended without a word"
    how = "is stopped by a signal" if state == "stopped" else "is dead, frozen or cut off"
    return f"rank {peer.rank} has been silent for {peer.silent_s:.0f} s: it {how}"


def _where_it_is(peer: Peer) -> str:
    if peer.report is None:
        return f"rank {peer.rank} has never been heard of"
    if peer.left:
        return f"rank {peer.rank} left after step {peer.report.step}"
    return f"rank {peer.rank} is past step {peer.report.step} at {peer.report.place}"
