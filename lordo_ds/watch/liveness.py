"""What the ranks of a run tell each other about themselves, and when that means that the run cannot go on.

Nothing here communicates or waits: `lordo_ds.watch.heartbeat` and `lordo_ds.watch.watchdog` do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from lordo_ds.watch.process import Process
from lordo_ds.watch.timeouts import Limits

LEFT = "left"  # `Report.ended` of a rank that closed its optimizer, or came to the end of its program
DEAF = "deaf"  # of one whose watchdog failed: its run goes on, but it tells and hears nothing more

# `Report.block`: among the collectives of all ranks, and of which.
START, END, FLIGHT, SAVE, LOAD = "start", "end", "flight", "save", "load"
_IN_BLOCK = {
    START: "at the start",
    END: "at the end of step {}",
    FLIGHT: "for the sync in flight at the end of step {}",
    SAVE: "in the save after step {}",
    LOAD: "in the load after step {}",
}
_MUST_COME = {
    START: "all ranks must create and attach the optimizer",
    END: "all replicas need equally many batches, or all must call finish() (final_sync()) after the last",
    FLIGHT: "all replicas need equally many batches, or all must call finish() (final_sync()) after the last",
    SAVE: "all ranks must save together",
    LOAD: "all ranks must load together",
}


@dataclass(frozen=True)
class Report:
    """One heartbeat of one rank.

    `beat` changes from one to the next. `step` is the last attempted step, `synced` the last that ended in a sync.
    `block` names the collectives of all ranks that it is among, "" elsewhere. `place` is where its main thread is, or
    the thread that this one waits for with a sync in flight; `waits` whether that is in a collective of the engine's or
    of ours. `replica` is the first rank of its replica, `begun` how many collectives it has begun in each group inside.
    `ended` says why no more beats will come.
    """

    beat: int = 0
    step: int = 0
    synced: int = 0
    block: str = ""
    place: str = ""
    ended: str = ""
    waits: bool = False
    replica: int = -1
    begun: dict[str, int] = field(default_factory=dict)

    def is_ahead_of(self, other: Report) -> bool:
        """Inside one replica and outside the blocks: whether it has begun a collective that the other has not."""
        if self.replica != other.replica or (self.step, self.block) != (other.step, other.block):
            return False
        return any(self.begun[name] > other.begun[name] for name in self.begun.keys() & other.begun.keys())

    def waits_for(self, other: Report) -> bool:
        """Whether it cannot go on before the other does, if neither has moved for long."""
        if self.block in (START, LOAD):  # a load brings the steps that it was saved with
            return other.block != self.block
        if self.block == other.block == FLIGHT and self.step == other.step:
            return self.waits and not other.waits
        if self.block:
            return other.step < self.step or (other.step == self.step and other.block != self.block)
        if self.replica != other.replica:
            return False
        return self.is_ahead_of(other) or (self.waits and not other.waits and other.step <= self.step)


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
    def deaf(self) -> bool:
        return self.report is not None and self.report.ended == DEAF

    @property
    def ended(self) -> bool:
        return self.report is not None and bool(self.report.ended)

    def is_silent(self, for_s: float) -> bool:
        """Without an excuse; one that has not begun yet is late, not silent."""
        return not (self.report is None or self.left or self.deaf) and self.silent_s > for_s

    def is_lost(self, observer: Process) -> bool:
        """Whether it certainly sends nothing any more, and did not leave in order."""
        return not self.left and ((self.ended and not self.deaf) or self.process.state(observer) == "gone")


@dataclass(frozen=True)
class Patience:
    """Seconds: with a silent rank, a collective that does not end, a save that does not move, and a lost rank."""

    silent_s: float
    stuck_s: float
    save_s: float
    lost_s: float

    @classmethod
    def of(cls, limits: Limits, before_first_step: bool) -> Patience:
        """The first step compiles and reads data: it may take longer."""
        stuck_s = limits.first_step_s if before_first_step else limits.step_s
        return cls(limits.step_s, stuck_s, limits.save_s, min(2.0, limits.step_s / 2))


class Finding(NamedTuple):
    """Why a run cannot go on, "" as long as it may; `again`: whether it may go well from the last checkpoint."""

    reason: str = ""
    again: bool = True


@dataclass(frozen=True)
class Stall:
    """Seconds for which a rank has begun and ended no collective, and for which its main thread has not moved."""

    waited_s: float = 0.0
    still_s: float = 0.0


def why_it_ends(
    me: Report, rank: int, stall: Stall, peers: Sequence[Peer], observer: Process, patience: Patience
) -> Finding:
    """Why this rank must not go on, naming the ranks to blame.

    A rank that is lost matters to whoever waits for it in a collective; elsewhere only once it has been silent for
    long, because it may have done all it had to do. A rank that left in order is blamed only by those who wait.
    Between steps, a rank that takes long is nobody's fault: only one for which others of its replica wait is.
    """
    blamed = [peer for peer in peers if peer.is_silent(patience.silent_s)]
    if stall.waited_s > patience.lost_s:
        blamed = [peer for peer in peers if peer in blamed or (peer.is_lost(observer) and _may_need(me, peer))]
    if blamed:
        return Finding("; ".join(what_is_wrong(peer, observer) for peer in blamed))
    missing = [peer for peer in peers if peer.left and _is_missed(me, peer)]
    if missing and stall.waited_s > patience.lost_s:
        return who_left(me, missing)
    if me.block in (SAVE, LOAD) and not me.waits and stall.still_s > patience.save_s:
        still = f"rank {rank} has neither read nor written anything for {stall.still_s:.0f} s"
        return Finding(f"{still} {_where(me)}, at {me.place}")
    if stall.waited_s <= patience.stuck_s:
        return Finding()
    found = who_holds_up(me, stall.waited_s, peers, observer, patience.silent_s)
    return found if found.reason else _nobody_moves(me, stall.waited_s, peers, patience)


def who_holds_up(me: Report, waited_s: float, peers: Sequence[Peer], observer: Process, silent_s: float) -> Finding:
    """The ranks that this one has waited for too long."""
    behind = [peer for peer in peers if peer.report is None or me.waits_for(peer.report)]
    behind = behind if me.block else [peer for peer in behind if peer.report is not None]
    if not behind:
        return Finding()
    # Those who wait for another of them themselves are not to blame.
    told = [one for one in behind if not any(_waits_for_one_behind(one, other) for other in behind)] or behind
    if all(peer.left for peer in told):
        return who_left(me, told)
    # A rank that says nothing either is on its way to being called silent.
    clauses = [
        what_is_wrong(peer, observer) if peer.is_silent(silent_s / 2) or peer.is_lost(observer) else _where_it_is(peer)
        for peer in told
    ]
    return Finding(f"waited {waited_s:.0f} s {_where(me)}: " + "; ".join(clauses))


def _where(me: Report) -> str:
    return _IN_BLOCK[me.block].format(me.step) if me.block else f"in a collective of its replica at {me.place}"


def _nobody_moves(me: Report, waited_s: float, peers: Sequence[Peer], patience: Patience) -> Finding:
    """All are where this rank is, as far as it depends on them, and wait."""
    others = [p.report for p in peers if p.report is not None and (me.block or p.report.replica == me.replica)]
    if me.block in (SAVE, LOAD) and (waited_s <= patience.save_s or not (me.waits and all(o.waits for o in others))):
        return Finding()  # who writes, or does not, knows it best
    if not me.block and not (me.waits and others and all(other.waits for other in others)):
        return Finding()
    if me.block:
        return Finding(f"all ranks have waited for {waited_s:.0f} s {_where(me)}")
    return Finding(f"all ranks of this replica have waited for {waited_s:.0f} s {_where(me)}")


def why_a_collective_failed(me: Report, peers: Sequence[Peer], observer: Process, silent_s: float) -> Finding:
    """The ranks whose end explains that a collective of this one's lost its connection."""
    lost = [peer for peer in peers if peer.is_lost(observer) or peer.is_silent(silent_s)]
    if lost:
        return Finding("; ".join(what_is_wrong(peer, observer) for peer in lost))
    left = [peer for peer in peers if peer.left and peer.report is not None]
    left = [p for p in left if p.report and (_is_missed(me, p) if me.block else p.report.replica == me.replica)]
    return who_left(me, left) if left else Finding()


def _may_need(me: Report, peer: Peer) -> bool:
    """Whether this rank, which waits, may wait for a lost one."""
    if me.block or peer.report is None:
        return bool(me.block)
    return me.replica == peer.report.replica and (me.waits or me.is_ahead_of(peer.report))


def _is_missed(me: Report, peer: Peer) -> bool:
    """Whether a rank that left must have come to where this one is; after the same step it may have come and gone."""
    assert peer.report is not None
    if me.block in (END, FLIGHT):
        return peer.report.step < me.step
    return bool(me.block) or _may_need(me, peer)


def _waits_for_one_behind(one: Peer, other: Peer) -> bool:
    if one.report is None or other.report is None or one is other or one.ended:
        return False
    return not one.report.block and one.report.waits_for(other.report)


def who_left(me: Report, left: Sequence[Peer]) -> Finding:
    """To start again from the last checkpoint would end in the same."""
    rule = _MUST_COME[me.block or END]
    return Finding("; ".join(_where_it_is(peer) for peer in left) + f": {rule}", again=False)


def what_is_wrong(peer: Peer, observer: Process) -> str:
    """One clause on a rank that is lost or silent."""
    state = peer.process.state(observer)
    if peer.ended and not (peer.left or peer.deaf):
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
        return f"rank {peer.rank} left after step {peer.report.step}, at the end of its program"
    if peer.deaf:
        return f"rank {peer.rank}, past step {peer.report.step}, tells no more where it is: its watchdog failed"
    where = f" {_IN_BLOCK[peer.report.block].format(peer.report.step)}" if peer.report.block else ""
    return f"rank {peer.rank} is past step {peer.report.step}{where} at {peer.report.place}"
