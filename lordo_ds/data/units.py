"""A source of documents, and how it is divided: units that depend on its content alone, never on who reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lordo_ds.data.corpus import content_digest

UNIT_BYTES = 4 << 20
"""About so much of a source is tokenized at once, by one process; another size gives other token files."""


@dataclass(frozen=True)
class Unit:
    """A part of a source: from `start` to `stop`, in bytes, row groups or rows; `size_bytes` is for the progress."""

    start: int
    stop: int
    size_bytes: int


class Source(Protocol):
    """A source of documents that can be sent to another process."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str:
        """How it is read; with the content and a unit, it decides the documents."""

    def paths(self) -> tuple[Path, ...]:
        """The files that are its content."""

    def units(self, unit_bytes: int) -> list[Unit]:
        """Consecutive units that cover it."""

    def documents(self, unit: Unit) -> Iterator[str]:
        """The documents of a unit that are not white space alone."""


@dataclass(frozen=True)
class OneFile:
    """A source that is one file, but for how it is read; `key` is where its records have the text."""

    path: Path
    key: str

    @property
    def name(self) -> str:
        return str(self.path)

    def paths(self) -> tuple[Path, ...]:
        return (self.path,)


def size_bytes(source: Source) -> int:
    return sum(path.stat().st_size for path in source.paths())


def state(source: Source) -> tuple[tuple[int, int], ...]:
    """Changes when somebody writes into its files."""
    return tuple((facts.st_size, facts.st_mtime_ns) for facts in (path.stat() for path in source.paths()))


def digest(source: Source, read: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of its content; of its files' digests where it has several. `read` counts the bytes."""
    digests = [content_digest(path, read) for path in source.paths()]
    return (digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()).hex()
