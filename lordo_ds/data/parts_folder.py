"""`PREFIX.parts`: where token files are made, by one process at a time, until their manifest says that all is there."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lordo_ds.data.corpus import DataError
from lordo_ds.data.manifest import SUFFIXES, data_path, manifest_path

_LOCK = "lordo.lock"
_OURS = ("*.part", "*.tmp", "*.model", "joined.*", _LOCK)


@contextmanager
def folder_of_parts(prefix: Path) -> Iterator[Path]:
    """Hold the folder; it stays after an error, for the next attempt, and goes when all is done.

    Raises:
        DataError: another process holds it, or files of these names lie there that lordo data has not made.
    """
    folder = data_path(prefix, ".parts")
    ours = (folder / _LOCK).is_file()
    in_the_way = [path for path in (data_path(prefix, suffix) for suffix in SUFFIXES) if path.exists()]
    if not ours and manifest_path(prefix).exists():
        in_the_way = []
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        in_the_way = [folder]
    if in_the_way and not ours:
        raise DataError(f"{in_the_way[0]}: exists, and lordo data has not made it; give another --out, or delete it")
    folder.mkdir(exist_ok=True)
    with (folder / _LOCK).open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{prefix}: another lordo data is making it; wait for its end") from None
        except OSError as error:
            raise DataError(
                f"{folder}: this file system has no file locks ({error.strerror}); give an --out on another one"
            ) from None
        try:
            yield folder
        except BaseException:
            if [path.name for path in folder.iterdir()] == [_LOCK]:
                _clear(folder)
            raise
        _clear(folder)


def _clear(folder: Path) -> None:
    """Take away what is ours in it, and the folder unless somebody has put something else there."""
    for pattern in _OURS:
        for path in folder.glob(pattern):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
