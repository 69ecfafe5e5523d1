"""What `lordo data` reads: text, jsonl and parquet files, and datasets of the Hugging Face Hub.

Reading is as strict as in `corpus`: what cannot be read as written raises `DataError` with the file and the line (or
row), the rule and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from lordo_ds.data.corpus import DataError, Extent, documents_of, is_jsonl
from lordo_ds.data.tables import HUB, ParquetFile, open_hub
from lordo_ds.data.units import OneFile, Source, Unit

_PARQUET = ".parquet"
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4", ".7z", ".tar")
_BLANK_LINE_WITHIN_BYTES = 64 << 10


def open_sources(names: Sequence[str], key: str = "text") -> list[Source]:
    """The sources of these names; `key` is where jsonl, parquet and datasets have the text.

    Raises:
        DataError: a name that leads to nothing that can be read, or a package that is missing for it.
    """
    return [_open(name, key) for name in names]


def _open(name: str, key: str) -> Source:
    if name.startswith(HUB):
        return open_hub(name, key)
    path = Path(name)
    if not path.exists():
        raise DataError(f"{path}: no such file; a dataset of the Hugging Face Hub is given as {HUB}OWNER/NAME")
    if not path.is_file():
        raise DataError(f"{path}: not a file; name the files inside it, as in {path}/*.jsonl")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; leave it out or fill it")
    if path.suffix.lower() in _PACKED:
        raise DataError(f"{path}: a packed file cannot be divided over processes; unpack it first")
    return ParquetFile(path, key) if path.suffix.lower() == _PARQUET else LinesFile(path, key)


# -- text and jsonl ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinesFile(OneFile):
    """A text file, whose documents end at blank lines, or a jsonl file of one document per line."""

    @property
    def kind(self) -> str:
        return f"jsonl, key {self.key}" if is_jsonl(self.path) else "text"

    def units(self, unit_bytes: int) -> list[Unit]:
        size = self.path.stat().st_size
        bounds = [0]
        with self.path.open("rb") as stream:
            for wanted in range(unit_bytes, size, unit_bytes):
                if wanted > bounds[-1]:  # a line may be longer than a unit
                    stream.seek(wanted)
                    stream.readline()
                    if not is_jsonl(self.path):
                        _skip_past_blank_line(stream)
                    bounds.append(stream.tell())
        bounds = sorted({*bounds, size})
        return [Unit(start, stop, stop - start) for start, stop in pairwise(bounds)]

    def documents(self, unit: Unit) -> Iterator[str]:
        return documents_of(Extent(self.path, unit.start, unit.stop), self.key)


def _skip_past_blank_line(stream: BinaryIO) -> None:
    """To the end of the next blank line, if one is near; else stay."""
    start = stream.tell()
    while stream.tell() - start < _BLANK_LINE_WITHIN_BYTES:
        line = stream.readline()
        if not line:
            break
        if not line.strip():
            return
    stream.seek(start)
