"""Where text comes from: the embedded corpus, plain text files, jsonl files.

A corpus is read as a stream of documents (strings), always in the same order, and has a fingerprint of its
content. Reading is strict: what cannot be read as written raises `DataError`, which names the file, the line,
the rule and the way out.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_DOCUMENT_CHARS = 16_384
"""A text file is cut into documents of about this size, so that some of them can be held out."""

_NOT_EMBEDDED = frozenset(
    # Tests, what is installed beside the library, and tables (character maps, bundled wheels): no prose.
    (
        *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"),
        *("encodings", "ensurepip", "pydoc_data"),
    )
)
_READ_BYTES = 1 << 20

Digest: TypeAlias = Callable[[Path], bytes]


class DataError(ValueError):
    """Text, or a setting of its preparation, that cannot be used; the message is one line for the user."""


class Corpus(Protocol):
    """A named, re-readable stream of documents."""

    @property
    def name(self) -> str: ...

    def documents(self) -> Iterator[str]:
        """Yield the documents, in the same order every time."""

    def fingerprint(self, digest: Digest | None = None) -> str:
        """Hex digest of everything that decides the documents; `digest` of a file, in place of reading it whole."""


class EmbeddedCorpus:
    """English and Python that every CPython carries: its help topics and the standard library's sources."""

    name = "embedded"

    def documents(self) -> Iterator[str]:
        from pydoc_data.topics import topics

        for title in sorted(topics):
            yield topics[title]
        for path in self._sources():
            # tokenize.open honours the file's own coding line.
            with tokenize.open(path) as source:
                text = source.read()
            if text.strip():
                yield text

    def fingerprint(self, digest: Digest | None = None) -> str:
        everything = hashlib.sha256(f"embedded {sys.version}".encode())
        for text in self.documents():
            everything.update(hashlib.sha256(text.encode()).digest())
        return everything.hexdigest()

    @staticmethod
    def _sources() -> list[Path]:
        library = Path(sysconfig.get_path("stdlib"))
        found = [
            path.relative_to(library)
            for path in library.rglob("*.py")
            if _NOT_EMBEDDED.isdisjoint(path.relative_to(library).parts[:-1])
            and not path.name.startswith("_sysconfigdata")
            and not path.relative_to(library).parts[0].startswith("config-")
        ]
        if not found:
            raise DataError(f"no standard library sources in {library}; give text of your own with --data")
        return [library / relative for relative in sorted(found, key=lambda relative: relative.as_posix())]


@dataclass(frozen=True)
class FileCorpus:
    """Text files (cut into documents at blank lines) and jsonl files (one document per line, key "text")."""

    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        for path in self.paths:
            if not path.exists():
                raise DataError(f"{path}: no such file; --data takes text or .jsonl files")
            if not path.is_file():
                raise DataError(f"{path}: not a file; name the files inside it, as in --data {path}/*.jsonl")
            if path.stat().st_size == 0:
                raise DataError(f"{path}: the file is empty; take it away from --data or fill it")

    @property
    def name(self) -> str:
        return ", ".join(path.name for path in self.paths)

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            count = 0
            for text in _jsonl_documents(path) if _is_jsonl(path) else _text_documents(path):
                if text.strip():
                    count += 1
                    yield text
            if not count:
                raise DataError(f"{path}: holds only white space; take it away from --data or fill it")

    def fingerprint(self, digest: Digest | None = None) -> str:
        everything = hashlib.sha256(b"files")
        for path in self.paths:
            everything.update(b"jsonl" if _is_jsonl(path) else b"text")
            everything.update((digest or content_digest)(path))
        return everything.hexdigest()


def open_corpus(paths: Sequence[str | Path]) -> Corpus:
    """The corpus of these files, or the embedded one where there are none."""
    return FileCorpus(tuple(Path(path) for path in paths)) if paths else EmbeddedCorpus()


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() in JSONL_SUFFIXES


def content_digest(path: Path) -> bytes:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.digest()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text, with its line end, of every line of a UTF-8 file."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: line {number}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8; "
                    f"convert the file first, as in iconv -f LATIN1 -t UTF-8"
                ) from None


def _text_documents(path: Path) -> Iterator[str]:
    """Cut at the first blank line past `TEXT_DOCUMENT_CHARS`, or at any line end past twice that."""
    held: list[str] = []
    chars = 0
    for _, line in _lines(path):
        held.append(line)
        chars += len(line)
        if chars >= TEXT_DOCUMENT_CHARS and (not line.strip() or chars >= 2 * TEXT_DOCUMENT_CHARS):
            yield "".join(held)
            held, chars = [], 0
    if held:
        yield "".join(held)


def _jsonl_documents(path: Path) -> Iterator[str]:
    rule = 'each line must be one JSON object like {"text": "..."}'
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number}: not JSON ({error.msg} at column {error.colno}); {rule}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}: line {number}: a JSON {type(record).__name__}, not an object; {rule}")
        if "text" not in record:
            keys = ", ".join(map(repr, record)) or "none"
            raise DataError(f'{path}: line {number}: no key "text" (keys: {keys}); {rule}')
        if not isinstance(record["text"], str):
            kind = type(record["text"]).__name__
            raise DataError(f'{path}: line {number}: "text" is a {kind}, not a string; {rule}')
        yield record["text"]
