"""What is written stays: files that others see whole or not at all, and that outlive a loss of power.

A file is on the disk when it was flushed, and can be found when its directory was, too. So everything is flushed from
the bottom up before a name says that it is complete.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

# A dot begins and this ends the name of what is being written, or replaced.
PART, OLD = ".lordo-part", ".lordo-old"
# What file systems answer that cannot flush a directory, most of which need not (NFS, FUSE).
_NOT_FOR_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}


def part_of(path: Path) -> Path:
    """Where a file or directory is written before it gets its name; no other file should be called so."""
    path = Path(os.path.abspath(path))
    return path.with_name(f".{path.name}{PART}")


def old_of(path: Path) -> Path:
    """Where a directory is while another takes its name."""
    path = Path(os.path.abspath(path))
    return path.with_name(f".{path.name}{OLD}")


def is_reserved(name: str) -> bool:
    """Whether a name is one of those, and none for anything else."""
    return name.startswith(".") and name.endswith((PART, OLD))


def flush_file(path: Path) -> None:
    """Put on the disk what any process has written into a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Put on the disk which names a directory holds: new ones, renamed ones, and that others are gone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def flush_folders(folder: Path) -> None:
    """The same for a directory and all below it, from the bottom up."""
    for path, _, _ in os.walk(folder, topdown=False):
        flush_folder(Path(path))


def flush_tree(folder: Path) -> None:
    """Put a directory on the disk, with every file and directory below it."""
    for path, _, names in os.walk(folder):
        for name in names:
            flush_file(Path(path, name))
    flush_folders(folder)


def make_folder(folder: Path) -> None:
    """Make a directory where there is none, and those above it, each flushed into the one that it lies in."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
        flush_folder(one.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file that others see whole or not at all, and that is on the disk afterwards."""
    part = part_of(path)
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    flush_folder(part.parent)
