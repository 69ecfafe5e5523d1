"""What a process that must end still says, whoever holds its streams, and whether or not anybody reads them."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Callable

_PATIENCE_S = 2.0
_STDERR = 2


def say(line: str) -> None:
    """A line to stderr, lost where nobody reads its pipe; not through sys.stderr, whose lock may be held."""
    text = f"{line}\n".encode(errors="backslashreplace")  # names of files and errors may hold anything
    if line and not _within(_PATIENCE_S, lambda: _write(text)):
        # The interpreter is on its way out and starts no more threads (Python 3.12).
        _, writable, _ = select.select([], [_STDERR], [], _PATIENCE_S)
        if writable:
            _write(text)


def say_unwatched(what: str, rank: int, error: Exception) -> None:
    """One of our threads failed, by a fault of ours."""
    say(
        f"LoRDO: the {what} of rank {rank} failed ({type(error).__name__}: {error}): the run goes on, but a rank that "
        "is dead, frozen or stuck is not noticed here any more. Please report this"
    )


def flush() -> None:
    """Flush what was printed; a thread that holds a stream's lock must not keep the process alive."""
    _within(1.0, lambda: [stream.flush() for stream in (sys.stdout, sys.stderr)])


def _write(text: bytes) -> None:
    while text:
        text = text[os.write(_STDERR, text) :]


def _within(seconds: float, action: Callable[[], object]) -> bool:
    """Do it in a thread, and wait no longer than this; False if there are no threads any more."""

    def attempt() -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the stream is closed, or none
            action()

    thread = threading.Thread(target=attempt, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return False
    thread.join(seconds)
    return True
