"""Directories that appear whole or not at all, and that replace or remove nothing but what such a directory was.

One that is being written is called `.<name>.lordo-part` and holds `unfinished.lordo.json`, its claim, from its first
moment to its last; one that is being replaced `.<name>.lordo-old`. A finished one holds `complete.json` (as those of
earlier versions do), which lists its files. What says neither of itself is somebody else's: it is never removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from lordo_ds.checkpoint.claim import STALE_AFTER_S, Claim, Owner, read_owner, wait_until_free
from lordo_ds.checkpoint.files import COMPLETE, Complete, file_sum, read_json, write_complete
from lordo_ds.disk import OLD, PART, flush_folder, flush_tree, is_reserved, make_folder, old_of, part_of
from lordo_ds.errors import CheckpointError

MARK = "unfinished.lordo.json"


class NewFolder:
    """A directory that is being written, claimed by this process.

    Attributes:
        target: the name that it will have.
        path: where to write.
    """

    def __init__(self, target: Path) -> None:
        """Begin it, empty; what an unfinished one of that name has left is removed.

        Raises:
            CheckpointError: the name belongs to something else, or another process is writing beside it.
        """
        self.target, self.path = Path(os.path.abspath(target)), part_of(target)
        recover_folder(self.target)
        refuse_others(self.target)
        make_folder(self.target.parent)
        for mark in self.target.parent.glob(f".*{PART}/{MARK}"):
            wait_until_free(mark, str(self.target.parent))
        for needed in (self.path, old_of(self.target)):
            if os.path.lexists(needed) and (needed.is_symlink() or not needed.is_dir() or not is_ours(needed)):
                raise CheckpointError(f"LoRDO: {needed} was not made by a save: move it away to save {self.target}")
        self.path.mkdir(exist_ok=True)
        self.claim = Claim.take(self.path / MARK, str(self.target))
        _empty(self.path)
        flush_tree(self.path)
        flush_folder(self.target.parent)

    def finish(self) -> None:
        """Give it its name, when `complete.json` is in it and all of it on the disk; what had the name is put aside.

        Raises:
            CheckpointError: the name, or the directory, has become somebody else's.
        """
        self.claim.check()
        refuse_others(self.target)
        old = old_of(self.target)
        if self.target.is_dir():
            remove_ours(old)
            os.replace(self.target, old)
        self.claim.release()
        os.replace(self.path, self.target)
        flush_folder(self.target.parent)

    def remove_old(self) -> None:
        """Remove what was put aside, and what saves that did not finish have left beside it."""
        remove_ours(old_of(self.target))
        sweep(self.target.parent)

    def abandon(self) -> None:
        """Remove it, unfinished; not one that another job has taken over."""
        if self.claim.released or self.claim.is_held():
            remove_ours(self.path)
        self.claim.release()


def recover_folder(folder: Path) -> None:
    """Put back a directory that was being replaced when the process died between the two renames."""
    old = old_of(folder)
    if not folder.exists() and (old / COMPLETE).is_file() and not (old / MARK).exists():
        os.replace(old, folder)


# -- whose a directory is ----------------------------------------------------------------------------


def listed_files(folder: Path) -> set[str] | None:
    """The files that a directory's `complete.json` lists; None where it has none of ours."""
    try:
        return set(Complete.model_validate(read_json(folder / COMPLETE)).files)
    except (CheckpointError, ValidationError):
        return None


def is_ours(folder: Path) -> bool:
    """Whether a directory with a reserved name says that a save has made it; an empty one holds nothing to lose."""
    return (folder / MARK).exists() or listed_files(folder) is not None or not os.listdir(folder)


def refuse_others(folder: Path) -> None:
    """Refuse to replace or remove what is not a finished save, or holds more than was saved in it.

    Raises:
        CheckpointError: naming what is there.
    """
    way_out = "move it away, or choose another name"
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"LoRDO: {folder} is no directory that a save has made: {way_out}")
    listed = listed_files(folder)
    if listed is None and os.listdir(folder):
        raise CheckpointError(f"LoRDO: {folder} was not made by a save of LoRDO, and would be replaced: {way_out}")
    known = {*(listed or ()), COMPLETE, MARK}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name not in known and (path.is_symlink() or not path.is_dir()):
            raise CheckpointError(f"LoRDO: {path} is not of the save that it lies in, and would go with it: {way_out}")


# -- removing ----------------------------------------------------------------------------------------


def remove_ours(folder: Path) -> None:
    """Remove a directory that has a reserved name, if it says that it is ours; what cannot be removed stays, marked."""
    assert is_reserved(folder.name), folder
    if folder.is_symlink() or not folder.is_dir() or not is_ours(folder):
        return
    (folder / MARK).touch()
    (folder / COMPLETE).unlink(missing_ok=True)  # so that half of it is not put back
    _empty(folder)
    if os.listdir(folder) == [MARK]:
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()


def remove_save(folder: Path) -> None:
    """Remove a finished save; a process that is killed while it does leaves nothing that bears its name.

    Raises:
        CheckpointError: it is something else, or holds more than was saved.
    """
    refuse_others(folder)
    old = old_of(folder)
    if folder.is_dir():
        remove_ours(old)
        (folder / MARK).touch()  # so that it is not put back
        os.replace(folder, old)
        flush_folder(old.parent)
        remove_ours(old)


def sweep(parent: Path) -> None:
    """Remove what saves that did not finish have left in a directory, unless their processes may still write."""
    for left in [*parent.glob(f".*{PART}"), *parent.glob(f".*{OLD}")]:
        target = left.with_name(left.name[1:].removesuffix(PART).removesuffix(OLD))
        recoverable = left.name.endswith(OLD) and not target.exists() and not (left / MARK).exists()
        written = left.name.endswith(PART) and _is_held(left / MARK)
        if left.is_dir() and not recoverable and not written:
            remove_ours(left)


def _is_held(mark: Path) -> bool:
    """Whether somebody may still write there; from another machine, unless the claim is old."""
    owner = read_owner(mark)
    alive = mark.exists() and not owner.same_process(Owner.this()) and owner.runs()
    if alive is None:
        newest = max(path.stat().st_mtime for path in (mark.parent.parent, mark))
        return newest - mark.stat().st_mtime <= STALE_AFTER_S
    return alive


def _empty(folder: Path) -> None:
    """Remove all but the mark."""
    for path in list(folder.iterdir()):
        if path.name == MARK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# -- without processes -------------------------------------------------------------------------------


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A directory to write into that takes its name, with `complete.json`, if the block does not raise."""
    new = NewFolder(folder)
    try:
        yield new.path
        found = sorted(path for path in new.path.rglob("*") if path.is_file() and path.name != MARK)
        sums = {str(path.relative_to(new.path)): file_sum(path) for path in found}
        flush_tree(new.path)
        write_complete(new.path, sums)
        new.finish()
    except BaseException:
        new.abandon()
        raise
    new.remove_old()
