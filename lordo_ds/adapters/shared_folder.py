"""Whether the ranks of all nodes see one another's files: before something is saved for all of them, and after."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from lordo_ds.checkpoint.claim import read_owner
from lordo_ds.checkpoint.files import file_sum
from lordo_ds.comm.groups import of_all_ranks
from lordo_ds.errors import CheckpointError

SEEN_WITHIN_S = 5.0  # network file systems may tell late of what is new
Sums = Mapping[str, tuple[int, int]]


def host_view() -> tuple[str, str]:
    """This rank's host, and what tells apart how it sees the file system from how others do."""
    try:
        mounts = os.readlink("/proc/self/ns/mnt")
    except OSError:  # not Linux
        mounts = ""
    return socket.gethostname(), mounts


def check_shared(claim_file: Path, token: str | None, folder: Path) -> None:
    """Refuse a directory that is not the same one on all ranks. Collective over all.

    Args:
        claim_file: that rank 0 has written; each rank names it as it sees it.
        token: what is in it (on rank 0).

    Raises:
        CheckpointError: on all ranks, naming those that do not see rank 0's file.
    """
    tokens = of_all_ranks(token)
    until = time.monotonic() + SEEN_WITHIN_S
    while (seen := read_owner(claim_file).token == tokens[0]) is False and time.monotonic() < until:
        time.sleep(0.1)
    answers = of_all_ranks((seen, host_view()[0], str(folder)))
    blind = [f"rank {rank} ({host}: {path})" for rank, (sees, host, path) in enumerate(answers) if not sees]
    if blind:
        more = f" and {len(blind) - 8} more" if len(blind) > 8 else ""
        raise CheckpointError(
            f"LoRDO: {', '.join(blind[:8])}{more} do not see what rank 0 ({answers[0][1]}: {answers[0][2]}) writes: "
            "give a directory on a file system that all nodes share"
        )


def check_files(part: Path, written: Sequence[Sums], views: Sequence[tuple[str, str]]) -> None:
    """Refuse a save that others than the writers do not see as it was written. Each rank does a share of it.

    Rank 0 sees every file with its size. A rank of another node than the writer's reads each once and compares the sum:
    on one node the writer has read it through the same file system itself.

    Args:
        part: the directory, as this rank names it.
        written: the files that each rank wrote, with their (bytes, CRC-32).
        views: `host_view` of each rank.

    Raises:
        CheckpointError: one is missing, or reads otherwise.
    """
    me = dist.get_rank()
    for writer, files in enumerate(written):
        others = [rank for rank, view in enumerate(views) if view != views[writer]]
        for index, (name, wanted) in enumerate(sorted(files.items())):
            reads = bool(others) and others[(writer + index) % len(others)] == me
            if not (reads or me == 0):
                continue
            found = _wait_for(part / name, wanted[0])
            if found != wanted[0] or (reads and file_sum(part / name) != wanted):
                how = "not there" if found < 0 else f"{found} bytes" if found != wanted[0] else "other bytes (CRC-32)"
                raise CheckpointError(
                    f"LoRDO: rank {writer} ({views[writer][0]}) has written {wanted[0]} bytes to {part / name}, which "
                    f"rank {me} ({views[me][0]}) sees as {how}: save into a directory on a file system that all share"
                )


def _wait_for(path: Path, size: int) -> int:
    """How large a file is, when it has the size or some time has gone by; -1 if it is not there."""
    until = time.monotonic() + SEEN_WITHIN_S
    while True:
        found = path.stat().st_size if path.is_file() else -1
        if found == size or time.monotonic() > until:
            return found
        time.sleep(0.1)
