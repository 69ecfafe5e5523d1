"""A file that says who writes into a directory, so that two jobs do not write into one.

Locks of the kernel do not reach every node of a shared file system, so the file holds its owner, who touches it every
few seconds while he lives. It is taken over where that process is seen to be gone, or, from another machine, where it
has not been touched for `STALE_AFTER_S`: a job that comes back on another node after a crash waits at most so long.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from lordo_ds.disk import part_of
from lordo_ds.errors import CheckpointError

BEAT_S = 5.0
STALE_AFTER_S = 30.0
_DYING_S = 3.0  # a killed process may take that long to end
_SETTLED_S = 0.2  # after which of two that took over one claim at once the later one has written
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Owner:
    """A process that claims something; `machine` tells hosts and containers apart, "" where that is unknown."""

    host: str = ""
    machine: str = ""
    pid: int = 0
    started: str = ""
    job: str = ""
    token: str = ""

    @classmethod
    def this(cls) -> Owner:
        """This process, with a token of its own at every call."""
        job = next((os.environ[name] for name in _JOB_VARIABLES if os.environ.get(name)), "")
        pid, token = os.getpid(), uuid.uuid4().hex
        try:
            machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
            return cls(socket.gethostname(), machine, pid, _started(pid), job, token)
        except OSError:  # not Linux
            return cls(socket.gethostname(), "", pid, "", job, token)

    def __str__(self) -> str:
        job = f", job {self.job[:80]}" if self.job not in ("", "none") else ""
        return f"process {self.pid} on {self.host[:80] or 'an unknown host'}{job}"

    def same_process(self, other: Owner) -> bool:
        return bool(self.machine) and (self.machine, self.pid, self.started) == (
            other.machine,
            other.pid,
            other.started,
        )

    def runs(self) -> bool | None:
        """Whether the process runs; None where that cannot be seen from here."""
        here = Owner.this()
        if not self.machine or self.machine != here.machine:
            return None
        try:
            return bool(_started(self.pid)) and _started(self.pid) == self.started
        except OSError:
            return False


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; "" for one that has ended and that nobody has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return "" if fields[0] in "ZXx" else fields[19]


class Claim:
    """A claim that this process holds until `release`, or its end."""

    def __init__(self, path: Path, owner: Owner) -> None:
        self.path, self.owner = path, owner
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lordo-claim", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, path: Path, what: str) -> Claim:
        """Claim by this file, waiting until it is sure that a former owner is gone.

        Args:
            what: is claimed, for the message.

        Raises:
            CheckpointError: another process has it.
        """
        owner = Owner.this()
        text = json.dumps(asdict(owner))
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            pass
        else:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            return cls(path, owner)
        wait_until_free(path, what)
        part = part_of(path.with_name(f"{path.name}-{owner.token}"))
        part.write_text(text)
        os.replace(part, path)
        time.sleep(_SETTLED_S)
        now = read_owner(path)
        if now.token != owner.token:
            raise CheckpointError(_taken(what, now))
        return cls(path, owner)

    @property
    def released(self) -> bool:
        return self._stop.is_set()

    def is_held(self) -> bool:
        """Whether the file still is this claim's."""
        return read_owner(self.path).token == self.owner.token

    def check(self) -> None:
        """Refuse to go on when others took it over, as they do when its owner was suspended for long.

        Raises:
            CheckpointError: it was.
        """
        now = read_owner(self.path)
        if now.token != self.owner.token:
            theirs = f"that of {now}" if now.token else "gone"
            raise CheckpointError(
                f"LoRDO: {self.path} was {self.owner}'s, and is now {theirs}: another job writes there: end one of them"
            )

    def release(self) -> None:
        """Give it back; the file goes if it still is this claim's."""
        self._stop.set()
        if self.owner.pid == os.getpid() and self.is_held():
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                if self.is_held():
                    os.utime(self.path)
            except OSError:  # a file system that is away for a while
                continue


def read_owner(path: Path) -> Owner:
    """Who claims by this file; an empty owner where it says nothing that can be read, or is not there."""
    try:
        with path.open(encoding="utf-8") as file:
            found = json.loads(file.read(4096))
        return Owner(**found) if all(type(value) in (str, int) for value in found.values()) else Owner()
    except (FileNotFoundError, ValueError, TypeError, AttributeError, RecursionError):
        return Owner()


def wait_until_free(path: Path, what: str) -> None:
    """Return when the owner of a claim is gone, or was this process.

    Raises:
        CheckpointError: he lives.
    """
    owner, began = read_owner(path), time.monotonic()
    if owner.same_process(Owner.this()):
        return
    first = _touched(path)
    age = 0.0 if first is None else _now_beside(path) - first
    while (touched := _touched(path)) is not None:
        alive, waited = owner.runs(), time.monotonic() - began
        if alive is False or (alive is None and touched == first and age + waited > STALE_AFTER_S):
            return
        if touched != first or (alive and waited > _DYING_S):
            raise CheckpointError(_taken(what, read_owner(path)))
        time.sleep(min(0.2, STALE_AFTER_S / 10))


def _taken(what: str, owner: Owner) -> str:
    return f"LoRDO: {what} is in use by {owner}: give every job a directory of its own, or end that one first"


def _touched(path: Path) -> float | None:
    """When a claim was last touched. Opened, since network file systems remember what they knew of closed files."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _now_beside(path: Path) -> float:
    """The time by the clock of the file system, which other machines' claims follow too."""
    probe = part_of(path.with_name(f"now-{uuid.uuid4().hex}"))
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()
