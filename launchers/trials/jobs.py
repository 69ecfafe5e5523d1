"""Small training jobs under a launcher, for the scripts that make them fail on purpose."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trials.machine import ROOT, git

RANKS = 2
MODEL = """\
num_layers: 2
hidden_size: 32
num_attention_heads: 4
ffn_hidden_size: 64
seq_length: 32
vocab_size: 512
"""
_OURS = ".emptied_by_lordo_tests"
PLANNED_STEPS = 20_000  # of the learning-rate schedule: longer than any of these runs


def write_settings(folder: Path, optimizer: dict[str, Any], **keys: Any) -> list[str]:
    """The files of a small GPT on 2 replicas; gives the options that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "LoRDO", "params": {"lr": 3e-3, "rank": 8, "sync_interval": 8, **optimizer}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": PLANNED_STEPS, "warmup_num_steps": 20, "warmup_type": "linear"},
        },
        **keys,
    }
    (folder / "ds.json").write_text(json.dumps(config, indent=2))
    (folder / "model.yaml").write_text(MODEL)
    return ["--deepspeed_config", str(folder / "ds.json"), "--model", str(folder / "model.yaml")]


@dataclass
class Job:
    """A training script under a launcher, in a session of its own; its output goes to a file."""

    process: subprocess.Popen[bytes]
    output: Path
    mark: str
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, launcher: str, script: list[str], output: Path, **environment: str) -> Job:
        """`launcher` is "torchrun" or "deepspeed", followed by options of its own."""
        mark = uuid.uuid4().hex
        program = [sys.executable, *_LAUNCHERS[launcher.split()[0]], *launcher.split()[1:]]
        if launcher.startswith("deepspeed"):
            program += ["--master_port", str(_free_port())]
        elif "--rdzv-endpoint" not in launcher:
            program += [f"--rdzv-endpoint=127.0.0.1:{_free_port()}"]
        settings = {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "launchers")]),
            "PYTHONWARNINGS": "ignore",
        }
        environ = {**os.environ, **settings, "LORDO_JOB": mark, **environment}
        with output.open("wb") as stream:
            process = subprocess.Popen(
                [*program, *script], stdout=stream, stderr=subprocess.STDOUT, env=environ, start_new_session=True
            )
        return cls(process, output, mark)

    def rank_pids(self) -> dict[int, int]:
        """The processes of the ranks, by rank; those alone that run now."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = dict(one.partition(b"=")[::2] for one in (folder / "environ").read_bytes().split(b"\0"))
                parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
                parent_rank = b"RANK=" in Path(f"/proc/{parent}/environ").read_bytes().replace(b"LOCAL_RANK=", b"")
            except OSError:
                continue
            if variables.get(b"LORDO_JOB") == self.mark.encode() and b"RANK" in variables and not parent_rank:
                found[int(variables[b"RANK"])] = int(folder.name)
        return found

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, words: str, timeout_s: float = 120.0) -> bool:
        """Whether the output has these words before the job ends."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if words in self.text():
                return True
            if self.process.poll() is not None:
                return words in self.text()
            time.sleep(0.02)
        return False

    def end(self, timeout_s: float) -> int | None:
        """Its exit code; None if it did not end by itself in that time, and was ended. Nothing of it is left then."""
        try:
            exit_code: int | None = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            exit_code = None
        for pid in [*self.rank_pids().values(), *([self.process.pid] if exit_code is None else [])]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        return exit_code


_LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "--nnodes=1", "--rdzv-backend=c10d"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(RANKS)],
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def circumstances() -> str:
    """Command, date, hardware and versions, for the file with the results."""
    command = " ".join([Path(sys.executable).name, os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    packages = ("torch", "deepspeed", "megatron-core")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    changes = " with changes" if git("status", "--porcelain") else ""
    state = (git("rev-parse", "--short", "HEAD") or "unknown") + changes
    return (
        f"`{command}`, {datetime.date.today()}; commit {state}; "
        f"{platform.machine()}, {os.cpu_count()} cores; python {platform.python_version()}, {versions}."
    )


def fresh_folder(path: Path) -> Path:
    """An empty directory; one that an earlier call made is emptied, another one is refused."""
    if path.is_dir() and any(path.iterdir()) and not (path / _OURS).exists():
        raise SystemExit(f"{path} was not made by this script: delete it, or give another --work-dir")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (path / _OURS).touch()
    return path
