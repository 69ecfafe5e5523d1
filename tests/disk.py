"""Plays the disk: what a process asks of it, in order."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Event = tuple[int, str, str]  # when (a clock that all processes share), what, the path


@contextmanager
def disk_calls() -> Iterator[list[Event]]:
    """Which files and directories are flushed, renamed and removed, in order."""
    events: list[Event] = []
    originals = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "rmdir")}

    def noted(name: str) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **given: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else str(first)
            if "dir_fd" in given and given["dir_fd"] is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{given['dir_fd']}"), path)
            result = originals[name](first, *rest, **given)
            events.append((time.monotonic_ns(), name, str(rest[0]) if name == "replace" else path))
            return result

        return call

    for name in originals:
        setattr(os, name, noted(name))
    try:
        yield events
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
