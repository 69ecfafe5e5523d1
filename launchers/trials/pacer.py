"""A training job in segments: ranks pause between them while the link is changed, and note what every step took.

The ranks and whoever paces them meet in a folder. Rank r says that it has paused by a file `rank<r>.at<n>`, and goes on
when `go<n>` is there; `quiet<n>` comes before it, when all have paused and nothing but heartbeats is on the link. Times
are those of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trials.hosts import INTERFACE

PACE = "LORDO_PACE"  # the variable that names the folder
_POLL_S, _GIVE_UP_S = 0.01, 900.0
_COUNTERS = Path("/sys/class/net") / INTERFACE / "statistics"


@dataclass(frozen=True)
class Segment:
    """Steps at one rate of the link; the first `settle_steps` of them are not measured."""

    mbit_per_s: float | None
    steps: int
    settle_steps: int = 0


@dataclass(frozen=True)
class Plan:
    """A job: `warm_up` steps on an unlimited link, then the segments."""

    warm_up: int
    segments: tuple[Segment, ...]

    @property
    def starts(self) -> list[int]:
        """How many steps come before each segment, and how many there are in all."""
        found = [self.warm_up]
        for segment in self.segments:
            found.append(found[-1] + segment.steps)
        return found

    @property
    def steps(self) -> int:
        return self.starts[-1]

    def write(self, folder: Path) -> None:
        (folder / "plan.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Plan:
        found = json.loads((folder / "plan.json").read_text())
        return cls(found["warm_up"], tuple(Segment(**one) for one in found["segments"]))


def traffic() -> dict[str, int]:
    """Bytes that this host has sent and received, headers of Ethernet, IP and TCP included."""
    return {f"{way}_bytes": int((_COUNTERS / f"{way}_bytes").read_text()) for way in ("tx", "rx")}


def waited_for_a_core() -> float | None:
    """Seconds for which this thread was ready to run and another one had its core; None where the kernel tells not."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return None


class Pacer:
    """One rank's side."""

    def __init__(self, folder: Path, rank: int, counters: Callable[[], dict[str, int]] = traffic) -> None:
        self.plan = Plan.read(folder)
        self._folder, self._rank, self._counters = folder, rank, counters
        self._pauses = {steps: number for number, steps in enumerate(self.plan.starts)}
        self._log = (folder / f"rank{rank}.jsonl").open("w", encoding="utf-8", buffering=1)

    def pause_after(self, steps: int) -> None:
        """Pause if a segment begins, or the last has ended, when that many steps have been made."""
        number = self._pauses.get(steps)
        if number is None:
            return
        (self._folder / f"rank{self._rank}.at{number}").touch()
        self._wait_for(f"quiet{number}")
        quiet = {"quiet_time": time.monotonic(), **{f"quiet_{key}": value for key, value in self._counters().items()}}
        self._wait_for(f"go{number}")
        row = {"segment": number, "time": time.monotonic(), **self._counters(), "queued_s": waited_for_a_core()}
        self._note({**row, **quiet})

    def note_step(self, step: int, tokens: int, **more: Any) -> None:
        """After a step: `tokens` are those of all ranks since the first step; more is of this rank in this step."""
        queued_s = waited_for_a_core()
        row = {"step": step, "time": time.monotonic(), **self._counters(), "tokens": tokens, "queued_s": queued_s}
        self._note({**row, **more})

    def _note(self, row: dict[str, Any]) -> None:
        self._log.write(json.dumps(row) + "\n")

    def _wait_for(self, name: str) -> None:
        until = time.monotonic() + _GIVE_UP_S
        while not (self._folder / name).exists():
            if time.monotonic() > until:
                raise TimeoutError(
                    f"{self._folder / name} has not come in {_GIVE_UP_S:g} s: who paces this job is gone"
                )
            time.sleep(_POLL_S)
