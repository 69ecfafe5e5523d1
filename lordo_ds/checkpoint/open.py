"""Opens a saved run of either kind."""

from __future__ import annotations

from pathlib import Path

from lordo_ds.checkpoint.files import verify, with_a_name
from lordo_ds.checkpoint.native_run import NativeRun
from lordo_ds.checkpoint.portable import PortableRun, is_portable
from lordo_ds.checkpoint.replica_folders import tag_folder
from lordo_ds.checkpoint.run import SavedRun


def open_run(path: str | Path, tag: str | None = None, *, check: bool = True) -> SavedRun:
    """A checkpoint directory, opened without processes and without the model.

    Args:
        path: where an engine saved, one of its tags, or a portable checkpoint.
        tag: default: the one that `latest` names.
        check: read all files first and compare their sums.

    Raises:
        CheckpointError: there is none, or it is not complete, damaged, or of another version.
    """
    path = with_a_name(Path(path))
    folder = path if tag is None else with_a_name(path / tag)
    portable = is_portable(folder)
    if not portable:
        folder = tag_folder(path, tag)
    if check:
        verify(folder)
    return PortableRun(folder) if portable else NativeRun(folder)
