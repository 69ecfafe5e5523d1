"""Finds a tag, and the folders in it that the replicas wrote: `<tag>/replica_<m>/`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lordo_ds.checkpoint.files import find_tag
from lordo_ds.checkpoint.folders import recover_folder
from lordo_ds.errors import CheckpointError

_FOLDER = re.compile(r"replica_(\d+)")


def tag_folder(path: str | Path, tag: str | None = None) -> Path:
    """The directory of a tag; without one `path` may be that directory itself, or what `latest` names is taken.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if tag is None and replica_numbers(path):
        return path
    found = find_tag(path, tag)
    if found is None:
        raise CheckpointError(f"LoRDO: {path} holds no checkpoint: neither `latest` nor replica_0; give its tag")
    recover_folder(path / found)
    return path / found


def replica_numbers(folder: Path) -> list[int]:
    """Numbers of the directories replica_<m>, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for match in map(_FOLDER.fullmatch, os.listdir(folder)) if match)


def replica_folders(folder: Path) -> list[Path]:
    """The directories of replicas 0, 1, ...

    Raises:
        CheckpointError: there is none, or one is missing.
    """
    found = replica_numbers(folder)
    if not found:
        raise CheckpointError(f"LoRDO: {folder} holds no replica_0: it was not saved by LoRDO")
    if found != list(range(len(found))):
        raise CheckpointError(f"LoRDO: {folder} holds the replicas {found}: one is missing")
    return [folder / f"replica_{m}" for m in found]
