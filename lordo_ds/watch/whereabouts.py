"""Where a thread of this process is, seen from another."""

from __future__ import annotations

import os
import sys
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

_LIBRARY = str(Path(os.__file__).parent)
_ENGINES = ("deepspeed", "megatron.core", "lordo_ds")
_COLLECTIVES = (str(Path(dist.__file__).parent), os.path.join("deepspeed", "comm") + os.sep)


@dataclass(frozen=True)
class Whereabouts:
    """`place` is for people. `waits`: among collectives that an engine or LoRDO began, not the user's own code.

    `motion` changes when the thread goes on, and says nothing else.
    """

    place: str
    waits: bool
    motion: int


def whereabouts(thread: int) -> Whereabouts:
    innermost = sys._current_frames().get(thread)
    motion, frame = 0, innermost
    while frame is not None:
        motion = zlib.crc32(f"{id(frame)} {frame.f_lasti}".encode(), motion)
        frame = frame.f_back
    return Whereabouts(_place(thread, innermost), _waits(innermost), motion)


def _place(thread: int, innermost: FrameType | None) -> str:
    """Outside Python's and the installed libraries if it can be said: file, line, function."""
    if thread == threading.main_thread().ident and not threading.main_thread().is_alive():
        others = [t.name for t in threading.enumerate() if not t.daemon and t.ident != thread]
        return f"its end, waiting for the thread(s) {', '.join(others)}" if others else "its end"
    frame = innermost
    while frame is not None and frame.f_code.co_filename.startswith((_LIBRARY, "<")):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "its end"
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} ({frame.f_code.co_name})"


def _waits(innermost: FrameType | None) -> bool:
    frame = innermost
    while frame is not None and _is_collective(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None or frame is innermost:
        return False
    homes = [sys.modules[name].__path__[0] + os.sep for name in _ENGINES if name in sys.modules]
    return frame.f_code.co_filename.startswith(tuple(homes))


def _is_collective(file: str) -> bool:
    return file.startswith(_COLLECTIVES[0]) or _COLLECTIVES[1] in file


def bytes_read_and_written(native_thread: int) -> int:
    """By this thread, to files; 0 where that is not known."""
    try:
        lines = Path(f"/proc/self/task/{native_thread}/io").read_bytes().split()
    except OSError:  # not Linux, or not allowed
        return 0
    return sum(int(lines[lines.index(name) + 1]) for name in (b"rchar:", b"wchar:"))
