"""Where a result came from: this checkout's commit, this machine's processor, and how busy it was."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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


def busy_cores(window_s: float) -> float:
    """How many cores all programs together kept busy in the next `window_s` seconds; NaN where the kernel tells not."""

    def busy_ticks() -> int:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        return user + nice + system + irq + softirq + steal

    try:
        before = busy_ticks()
    except OSError:
        return math.nan
    time.sleep(window_s)
    return (busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / window_s
