"""The network bench: one small point over real links, and that nothing of it is left, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trials.hosts import PREFIX, why_not
from trials.network_points import read_points

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
num_layers: 2
hidden_size: 32
num_attention_heads: 4
ffn_hidden_size: 64
seq_length: 32
vocab_size: 512
"""
TABLE = """
- name: LoRDO
  ds: lordo
  changes: {train_micro_batch_size_per_gpu: 2, optimizer: {params: {sync_interval: 4}}}
- name: unknown
  ds: lordo
  changes: {optimizer: {params: {pseudo_gradient_dtype: int3}}}
"""

pytestmark = [pytest.mark.deepspeed, pytest.mark.megatron]


@pytest.fixture(scope="module", autouse=True)
def can_have_hosts() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


Bench = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Starts the bench with these options; ended after the test, if need be."""
    started: list[Bench] = []

    def begin(*options: str) -> Bench:
        started.append(_start(tmp_path, *options))
        return started[-1]

    yield begin
    for bench in started:
        if bench.poll() is None:
            bench.terminate()
            bench.communicate(timeout=60)


def _start(folder: Path, *options: str) -> Bench:
    (folder / "model.yaml").write_text(MODEL)
    (folder / "table.yaml").write_text(TABLE)
    own = ["--model", str(folder / "model.yaml"), "--table", str(folder / "table.yaml"), "--hosts", "2"]
    own += ["--repetitions", "1", "--least-steps", "4", "--work-dir", str(folder / "work")]
    command = [sys.executable, str(ROOT / "launchers" / "bench_network.py"), *own, *options]
    environment = {**os.environ, "LORDO_CACHE": str(folder / "cache"), "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [*command, "--output", str(folder / "net")], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, cwd=folder,
    )  # fmt: skip


def hosts_of(bench: Bench) -> list[str]:
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in names if name.startswith(f"{PREFIX}-{bench.pid}-")]


def test_a_point_over_a_slow_link_counts_what_the_ledger_counts(tmp_path: Path, start: Callable[..., Bench]) -> None:
    bench = start("--rates", "8", "unlimited")
    said, _ = bench.communicate()
    assert bench.returncode == 0, said
    slow, free, *refused = read_points(tmp_path / "net.csv")
    for point in (slow, free):
        assert point.ok and point.steps == 4 and point.tokens_per_s and point.step_s, point
        assert point.tokens_per_s * point.step_s == pytest.approx(2 * 2 * 32, rel=1e-4)
        assert point.ledger_bytes and point.ledger_bytes == slow.ledger_bytes
        assert point.queued_s is not None and 0 <= point.queued_s < point.step_s
    assert slow.mbit_per_s == 8.0 and free.mbit_per_s is None
    # Of a wire's packet of 1514 bytes 1448 are the message's; small messages weigh more.
    assert slow.ledger_share and 0.75 < slow.ledger_share < 1448 / 1514
    assert slow.tx_bytes and slow.step_s and slow.step_s > slow.tx_bytes * 8 / 8e6, "the link was not as slow as asked"
    assert len(refused) == 2 and all("int3" in point.status for point in refused)
    assert "unknown: refused" in (tmp_path / "net.md").read_text() and (tmp_path / "net.png").exists()
    assert not hosts_of(bench)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_leaves_no_host_and_no_process(
    tmp_path: Path, start: Callable[..., Bench], how: signal.Signals
) -> None:
    bench = start("--rates", "unlimited")
    logs = tmp_path / "work" / "LoRDO_2_1"
    until = time.monotonic() + 120
    while not (logs / "host1.log").exists():  # both hosts have their launcher
        assert bench.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    names = hosts_of(bench)
    assert len(names) == 3
    bench.send_signal(how)
    bench.wait(60)
    assert bench.returncode not in (0, None) and not hosts_of(bench)
    left = [
        pid for pid in filter(str.isdigit, os.listdir("/proc"))
        if str(tmp_path / "work") in _environment(pid)
    ]  # fmt: skip
    assert not left


def _environment(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_a_mistake_is_one_line(start: Callable[..., Bench]) -> None:
    bench = start("--rates", "fast")
    said, _ = bench.communicate()
    message = "--rates fast: must be a number of Mbit/s above 0 and below 1e6, or `unlimited`"
    assert (bench.returncode, said) == (2, f"bench_network.py: error: {message}\n")
