"""How far a long command is: one updating line on a terminal, a plain line now and then in a file."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

_TERMINAL_INTERVAL_S = 0.1
_FILE_INTERVAL_S = 10.0
_BAR_CHARS = 24
_SHORTEST_BAR_CHARS = 6


def in_bytes(amount: float) -> str:
    """An amount of bytes, as in `12.3 MB`; decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def in_time(seconds: float) -> str:
    """A duration, as in `4:05` or `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """A part of `total` that grows; shown with its rate and the time that is left. May be used by several threads.

    Leaving the context ends the line; what was shown last stays.
    """

    def __init__(
        self,
        what: str,
        total: int,
        in_words: Callable[[float], str] = in_bytes,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self._in_words, self._clock = what, total, in_words, clock
        self._stream = sys.stderr if stream is None else stream
        self._on_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self.done = 0
        self._began = self._shown = clock()
        self._lock = threading.Lock()
        self._open = False

    def add(self, amount: int) -> None:
        """So much more is done."""
        with self._lock:
            self.done += amount
            now = self._clock()
            if now - self._shown >= (_TERMINAL_INTERVAL_S if self._on_terminal else _FILE_INTERVAL_S):
                self._shown = now
                self._show(now)

    def line(self, now: float, columns: int = 0) -> str:
        """What is shown at time `now`: with a bar, where it fits into so many columns, and cut to them."""
        share = min(self.done / self.total, 1.0) if self.total else 1.0
        seconds = now - self._began
        rate = self.done / seconds if seconds > 0 else 0.0
        left = f"{in_time((self.total - self.done) / rate)} left" if 0 < self.done < self.total and rate else ""
        words = [
            f"{self.what} {share:4.0%}",
            f"{self._in_words(self.done)} of {self._in_words(self.total)}",
            f"{self._in_words(rate)}/s",
            left or f"in {in_time(seconds)}",
        ]
        if not columns:
            return "  ".join(words)
        room = min(columns - len("  ".join(words)) - len("  []"), _BAR_CHARS)
        if room >= _SHORTEST_BAR_CHARS:
            words.insert(1, f"[{'#' * int(share * room):<{room}}]")
        return "  ".join(words)[:columns]

    def _show(self, now: float) -> None:
        if self._on_terminal:
            columns = shutil.get_terminal_size().columns - 1  # a full last column would begin a new line
            self._stream.write(f"\r{self.line(now, columns)}\x1b[K")
            self._open = True
        else:
            self._stream.write(self.line(now) + "\n")
        self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            # In a file, what took no time needs no line.
            if error is None and (self._on_terminal or self._clock() - self._began >= _FILE_INTERVAL_S):
                self._show(self._clock())
            if self._open:
                self._stream.write("\n")
                self._stream.flush()
                self._open = False
