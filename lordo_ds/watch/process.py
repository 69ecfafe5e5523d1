"""A process, as others on its host find it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """`host` tells hosts and containers apart, "" where that is unknown."""

    host: str = ""
    pid: int = 0
    started: str = ""

    @classmethod
    def this(cls) -> Process:
        try:
            host = (PROC / "sys/kernel/random/boot_id").read_text().strip() + os.readlink(PROC / "self/ns/pid")
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
    """State letter and start time of a process.

    Its name, before them, may hold blanks, brackets and line ends, and is cut after 15 bytes, inside a character too.
    """
    fields = (PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    return fields[0].decode(), fields[19].decode()
