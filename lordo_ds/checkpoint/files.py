"""Files of a checkpoint: read without running what is in them, whole or not at all, and written so.

A saved directory is complete when it holds `complete.json`, which lists every other file with its size and CRC-32.
It is written last, and the directory gets its name only then.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from lordo_ds.checkpoint.header import check_format
from lordo_ds.disk import old_of, part_of, write_text
from lordo_ds.errors import CheckpointError

COMPLETE = "complete.json"
LATEST = "latest"
COMPLETE_FORMAT = 1
_CHUNK_BYTES = 1 << 22


# -- reading -----------------------------------------------------------------------------------------


class _LossScaler:
    """Stands for DeepSpeed's loss scalers: attributes only."""


class _FragmentAddress:
    """Stands for DeepSpeed's `fragment_address`."""


class _ZeroStage(IntEnum):
    """Stands for DeepSpeed's `ZeroStageEnum`."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


# What DeepSpeed 0.19.8 pickles beside tensors and plain values.
DEEPSPEED_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _LossScaler,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _LossScaler,
    "deepspeed.utils.tensor_fragment.fragment_address": _FragmentAddress,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _ZeroStage,
}


def read_saved(path: str | Path, classes: Mapping[str, Any] | None = None, map_location: Any = "cpu") -> Any:
    """What `torch.save` wrote, tensors mapped and not read; nothing but tensors and plain values is unpickled.

    Args:
        classes: by its full name, what may be made of a class besides; by default stand-ins for DeepSpeed's.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    try:
        with _nothing_but(DEEPSPEED_CLASSES if classes is None else classes):
            zipped = zipfile.is_zipfile(path)
            if zipped:
                _refuse_compressed(path)
            return torch.load(path, map_location=map_location, weights_only=True, mmap=zipped)
    except FileNotFoundError:
        raise CheckpointError(f"LoRDO: {path} is missing") from None
    except Exception as error:  # torch raises whatever its readers stumble over
        raise CheckpointError(f"LoRDO: {path} cannot be read: {_reason(error)}") from None


def _refuse_compressed(path: str | Path) -> None:
    """torch stores its records as they are: one that is compressed may unfold to any size."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise ValueError("it holds compressed records, which torch does not write")


@contextmanager
def _nothing_but(classes: Mapping[str, Any]) -> Iterator[None]:
    """What else the process has declared safe (Megatron-core does) is not, for a block."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(made, name) for name, made in classes.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    found = re.search(r"GLOBAL (\S+)", text)
    if found:
        return (
            f"it holds an object of {found[1]}, and loading runs no code: it is no checkpoint of this package, "
            "or its client_state had more than tensors and plain values"
        )
    return f"{type(error).__name__}: {text[:200]}; it is truncated, damaged or no checkpoint"


def unsafe_classes(path: str | Path) -> list[str]:
    """Full names of the classes in a saved file that `read_saved` would refuse.

    Raises:
        CheckpointError: it would refuse the file for another reason.
    """
    if not zipfile.is_zipfile(path):  # torch's older format, if the configuration asks for it
        read_saved(path)
        return []
    with _nothing_but(DEEPSPEED_CLASSES):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))


def find_tag(folder: str | Path, tag: str | None) -> str | None:
    """The given tag, or the one that `latest` names; None without either.

    Raises:
        CheckpointError: `latest` does not hold the name of a directory.
    """
    if tag is not None:
        return str(tag)
    try:
        found = (Path(folder) / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"LoRDO: {Path(folder) / LATEST} cannot be read: {error}") from None
    if not found or Path(found).is_absolute() or ".." in Path(found).parts:
        raise CheckpointError(f"LoRDO: {Path(folder) / LATEST} holds {found[:80]!r}, which is no tag: give tag=")
    return found


# -- completeness ------------------------------------------------------------------------------------


class Complete(BaseModel):
    """`complete.json`: the files of a finished checkpoint, by their path in it, as (bytes, CRC-32)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    files: dict[str, tuple[NonNegativeInt, NonNegativeInt]]


def read_complete(folder: Path) -> Complete:
    """The list of files of a finished checkpoint, every one of which is there and has its size.

    Raises:
        CheckpointError: the checkpoint is not complete, or of another version.
    """
    if not folder.is_dir():
        left = [path.name for path in _unfinished(folder) if path.is_dir()]
        hint = f"; a save ended before it was complete and left {left[0]}" if left else ""
        raise CheckpointError(f"LoRDO: there is no checkpoint {folder}{hint}")
    path = folder / COMPLETE
    if not path.is_file():
        raise CheckpointError(
            f"LoRDO: {folder} has no {COMPLETE}: saving it did not finish, or it was not saved by this version of "
            "LoRDO: choose another tag"
        )
    data = read_json(path)
    check_format(data.get("format"), COMPLETE_FORMAT, str(path))
    try:
        complete = Complete.model_validate(data)
    except ValidationError as error:
        raise CheckpointError(f"LoRDO: {path} is damaged: {error.errors(include_url=False)[0]['msg']}") from None
    for name, (size, _) in complete.files.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"LoRDO: {path} is damaged: it lists {name!r}")
        if not file.is_file():
            raise CheckpointError(f"LoRDO: {file} is missing, which {COMPLETE} lists")
        if file.stat().st_size != size:
            raise CheckpointError(f"LoRDO: {file} has {file.stat().st_size} bytes, not {size}: it is truncated")
    return complete


def _unfinished(folder: Path) -> list[Path]:
    """What a save that was cut short may have left; earlier versions called it otherwise."""
    return [part_of(folder), old_of(folder), *(folder.with_name(folder.name + end) for end in (".part", ".old"))]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"LoRDO: {path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"LoRDO: {path} is damaged: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"LoRDO: {path} is damaged: it holds no JSON object")
    return data


def check_sums(folder: Path, complete: Complete, names: Iterable[str]) -> None:
    """Read these files and compare their sums.

    Raises:
        CheckpointError: one has changed since it was saved.
    """
    for name in names:
        if file_sum(folder / name)[1] != complete.files[name][1]:
            raise CheckpointError(
                f"LoRDO: {folder / name} has changed since it was saved (another CRC-32): it is damaged, choose "
                "another tag"
            )


def verify(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Check that a checkpoint is complete, and the sums of part `part` of `parts` of its files, to be shared out.

    Raises:
        CheckpointError: a file is missing, or has changed since it was saved.
    """
    complete = read_complete(folder)
    # Large files first, dealt out in turn.
    names = sorted(complete.files, key=lambda name: (-complete.files[name][0], name))
    check_sums(folder, complete, names[part::parts])


def file_sum(path: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


# -- writing -----------------------------------------------------------------------------------------


def write_complete(folder: Path, sums: Mapping[str, tuple[int, int]]) -> None:
    """Declare a directory complete."""
    files = {name: list(pair) for name, pair in sorted(sums.items())}
    write_text(folder / COMPLETE, json.dumps({"format": COMPLETE_FORMAT, "files": files}, indent=1))


def with_a_name(path: Path) -> Path:
    """The same directory by a path that ends in its name: `.` and `x/..` do not, and siblings are named after it."""
    return path if path.name not in ("", "..") else path.resolve()
