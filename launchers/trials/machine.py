"""Where a result came from: this checkout's commit, this machine's processor, and how busy it was."""

from __future__ import annotations

import math
import platform
import subprocess
import time
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
_SAMPLE_S = 0.05


def git(*arguments: str) -> str:
    """What git says of this checkout; "" where it is none."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def processor() -> str:
    """The CPU's name, or its architecture where the system does not give one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def running_threads(window_s: float) -> float:
    """Threads of all programs but this one that ran or waited for a core, on average over the next `window_s` seconds.

    NaN where the kernel does not tell.
    """
    found: list[int] = []
    until = time.monotonic() + window_s
    while time.monotonic() < until:
        try:
            lines = Path("/proc/stat").read_text().splitlines()
        except OSError:
            return math.nan
        found.append(next(int(line.split()[1]) for line in lines if line.startswith("procs_running")) - 1)
        time.sleep(_SAMPLE_S)
    return fmean(found)
