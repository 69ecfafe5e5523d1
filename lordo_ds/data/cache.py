"""A folder of finished builds: one process builds, the others wait, nobody sees a half-built one."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lordo_ds.data.corpus import DataError, content_digest
from lordo_ds.disk import flush_folder, flush_tree

REMEMBERED_BYTES = 64 << 20
"""Files of this size and more are read whole once; later their path, size and time stand for their content."""


def default_cache() -> Path:
    """`$LORDO_CACHE`, or `~/.cache/lordo_ds`."""
    return Path(os.environ.get("LORDO_CACHE") or "~/.cache/lordo_ds").expanduser()


@contextmanager
def locked(path: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel drops it when its holder dies, however that happens."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a")
    except OSError as error:
        raise DataError(
            f"{path.parent}: cannot hold the data cache ({error.strerror}); set LORDO_CACHE to a writable folder"
        ) from None
    with stream:
        try:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process to finish {path.stem}")
                fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            raise DataError(
                f"{path}: this file system has no file locks ({error.strerror}); set LORDO_CACHE to a folder on "
                "another one, each node's own, say"
            ) from None
        yield


def build_once(target: Path, build: Callable[[Path], None], say: Callable[[str], None] = print) -> Path:
    """Return `target`, having called `build(folder)` to fill it unless it is already there.

    The folder is a temporary one beside `target`, renamed into place when `build` returns. What a killed
    builder left behind is swept away by the next one on its machine; others may not see each other's locks.
    """
    if target.is_dir():
        return target
    with locked(target.parent / f"{target.name}.lock", say):
        if target.is_dir():
            return target
        own = f"{target.name}.tmp-{socket.gethostname()}-"
        for leftover in target.parent.glob(f"{glob.escape(own)}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = target.parent / f"{own}{os.getpid()}"
        folder.mkdir()
        try:
            build(folder)
            flush_tree(folder)  # a name without its content would be taken for a finished build after a loss of power
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
                shutil.rmtree(folder, ignore_errors=True)  # another machine was faster
            flush_folder(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return target


def remembered_digest(path: Path, cache: Path, say: Callable[[str], None] = print) -> bytes:
    """The SHA-256 of a file's bytes; of a large one that has not changed since, without reading it.

    Many ranks start at once, and again after every crash: one of them reads the file, and keeps what it found.
    """
    facts = path.stat()
    if facts.st_size < REMEMBERED_BYTES:
        return content_digest(path)
    state = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    kept = cache / f"digest-{hashlib.sha256(state.encode()).hexdigest()[:20]}"

    def build(folder: Path) -> None:
        (folder / "sha256").write_bytes(content_digest(path))

    return (build_once(kept, build, say) / "sha256").read_bytes()
