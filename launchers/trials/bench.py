"""What benchmarks share: clocks, peaks of memory, and what a result file says of where it came from."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trials.machine import ROOT, git, processor


def seconds() -> float:
    """A clock: of the device once it is done; without one, of the CPU time that this process used.

    On a CPU the wall clock also shows what else the machine does.
    """
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        return time.process_time()
    get_accelerator().synchronize()
    return time.perf_counter()


def clocked(function: Callable[..., Any], kind: str, spent: Counter[str]) -> Callable[..., Any]:
    """The function, which adds its seconds to `spent[kind]`."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = seconds()
        result = function(*args, **kwargs)
        spent[kind] += seconds() - began  # type: ignore[assignment]
        return result

    return timed


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low_quartile": low, "high_quartile": high}


def reset_peak() -> int | None:
    """Start a new peak; the bytes in use now, or None where the system does not tell (no GPU and no Linux)."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, and not seen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return peak()


def peak() -> int:
    """Bytes of CUDA tensors, or of resident memory, at the highest since `reset_peak`."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(line for line in _read("/proc/self/status").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def gpu_count() -> int:
    """GPUs to use; none with DS_ACCELERATOR=cpu."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def run_processes(count: int, script: str, arguments: list[str]) -> None:
    """Run a script of this repository in `count` processes of this machine, on the CPU where there is no GPU.

    Ends the program if one of them fails, which has then said why.
    """
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONWARNINGS": "ignore", **os.environ, "PYTHONPATH": python_path}
    if not gpu_count():
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    if subprocess.call([sys.executable, *launcher, script, *arguments], env=environment):
        sys.exit(f"{Path(script).name}: {count} process(es) failed")


def provenance() -> dict[str, Any]:
    """Command, date, commit, hardware and versions."""
    packages = ("torch", "deepspeed", "megatron-core")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
