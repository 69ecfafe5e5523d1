"""A folder of finished builds: one process builds, the others wait, nobody sees a half-built one."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lordo_ds.data.corpus import DataError


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
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process to finish {path.stem}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def build_once(target: Path, build: Callable[[Path], None], say: Callable[[str], None] = print) -> Path:
    """Return `target`, having called `build(folder)` to fill it unless it is already there.

    The folder is a temporary one beside `target`, renamed into place when `build` returns. What a killed
    builder left behind is swept away by the next one.
    """
    if target.is_dir():
        return target
    with locked(target.parent / f"{target.name}.lock", say):
        if target.is_dir():
            return target
        for leftover in target.parent.glob(f"{target.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = target.parent / f"{target.name}.tmp-{socket.gethostname()}-{os.getpid()}"
        folder.mkdir()
        try:
            build(folder)
            folder.rename(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return target
