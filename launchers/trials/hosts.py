"""Hosts on one machine: network namespaces on one bridge, each behind a link of a chosen rate.

Every host has an interface of its own, so its kernel counts what went over the link, and runs what `Hosts.command`
wraps. Needs Linux, root, `ip` and `tc`, and the kernel's veth, bridge and tbf.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

INTERFACE = "eth0"
PREFIX = "lordo"
# Of the token bucket: how long a packet may wait in its queue, and what may leave at once.
_QUEUE_MS, _BURST_S, _LEAST_BURST_BYTES = 50, 0.002, 16 * 1024
_SEGMENTS_OF_AN_UNLIMITED_LINK = 65_535  # the kernel's default


class HostsError(ValueError):
    """This machine cannot have such hosts; the message says why."""


class Hosts:
    """Hosts 0 to count - 1 with addresses of one subnet. Leaving the context ends what runs in them and deletes them.

    Names carry this process's id and a random part: several of these may run at once, and each deletes its own.
    """

    def __init__(self, count: int) -> None:
        if not 2 <= count <= 200:
            raise ValueError(f"{count} hosts: must be between 2 and 200")
        self.count = count
        self.addresses = [f"10.77.0.{number + 1}" for number in range(count)]
        mark = f"{PREFIX}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._hub = f"{mark}-hub"
        self._names = [f"{mark}-{number}" for number in range(count)]

    def __enter__(self) -> Hosts:
        require_tools()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> None:
        for name in (self._hub, *self._names):
            _run("ip", "netns", "add", name)
        _run("ip", "-n", self._hub, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", self._hub, "link", "set", "bridge0", "up")
        for number, name in enumerate(self._names):
            port, peer = f"port{number}", ("peer", "name", INTERFACE, "netns", name)
            _run("ip", "-n", self._hub, "link", "add", port, "type", "veth", *peer)
            _run("ip", "-n", self._hub, "link", "set", port, "master", "bridge0", "up")
            _run("ip", "-n", name, "addr", "add", f"{self.addresses[number]}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")

    def set_rate(self, mbit_per_s: float | None) -> None:
        """Limit what each host sends, and what it receives, to this rate each (10^6 bits/s); None lifts the limit.

        A limited interface sends packets of the wire's size, so its counters hold every packet's headers. Without a
        limit the kernel hands over up to 64 KiB at once, which is faster and counts one header for all of it.
        """
        ends = [(name, INTERFACE) for name in self._names]
        ends += [(self._hub, f"port{number}") for number in range(self.count)]
        segments = _SEGMENTS_OF_AN_UNLIMITED_LINK if mbit_per_s is None else 1
        for name, interface in ends:
            _run("ip", "-n", name, "link", "set", interface, "gso_max_segs", str(segments))
            if mbit_per_s is None:
                # There is none yet when the first rate is "no limit".
                _run("tc", "-n", name, "qdisc", "replace", "dev", interface, "root", "pfifo")
            else:
                _run("tc", "-n", name, "qdisc", "replace", "dev", interface, "root", *token_bucket(mbit_per_s))

    def command(self, host: int, *program: str) -> list[str]:
        """What runs a program in a host."""
        return ["ip", "netns", "exec", self._names[host], *program]

    def end_processes(self) -> None:
        """Kill what runs in the hosts; returns when nothing does."""
        until = time.monotonic() + 10.0
        while (pids := self._pids()) and time.monotonic() < until:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        if pids:
            raise RuntimeError(f"processes {pids} in {self._names} do not end")

    def _pids(self) -> list[int]:
        found: list[int] = []
        for name in self._existing():
            done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            found += map(int, done.stdout.split())
        return found

    def _existing(self) -> list[str]:
        lines = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines()
        there = {line.split()[0] for line in lines if line.strip()}
        return [name for name in (*self._names, self._hub) if name in there]

    def close(self) -> None:
        """End what runs in them and delete them. Ctrl-C and SIGTERM do not stop it half-way."""
        with _undisturbed():
            self.end_processes()
            for name in self._existing():
                _run("ip", "netns", "del", name)


def token_bucket(mbit_per_s: float) -> list[str]:
    """The arguments of `tc qdisc` that make a link of this rate."""
    if mbit_per_s <= 0:
        raise ValueError(f"a rate of {mbit_per_s:g} Mbit/s: must be above 0")
    bits_per_s = round(mbit_per_s * 1e6)
    burst = max(_LEAST_BURST_BYTES, round(bits_per_s / 8 * _BURST_S))
    return ["tbf", "rate", f"{bits_per_s}bit", "burst", f"{burst}b", "latency", f"{_QUEUE_MS}ms"]


def require_tools() -> None:
    """
    Raises:
        HostsError: no root, no `ip` or no `tc`.
    """
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        raise HostsError(f"network namespaces need {' and '.join(missing)}: install iproute2")
    if os.geteuid() != 0:
        raise HostsError("network namespaces need root: run this as root, or in a container with CAP_NET_ADMIN")


def why_not() -> str:
    """Why this machine cannot have hosts with slow links; "" if it can. Makes two and deletes them."""
    try:
        with Hosts(2) as hosts:
            hosts.set_rate(10.0)
    except HostsError as error:
        return str(error)
    return ""


@contextmanager
def _undisturbed() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise HostsError(f"this machine cannot have hosts of its own: `{' '.join(command)}`: {said}")
