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
            for text in documents_of(Extent(path)):
                count += 1
                yield text
            if not count:
                raise DataError(f"{path}: holds only white space; take it away from --data or fill it")

    def fingerprint(self, digest: Digest | None = None) -> str:
        everything = hashlib.sha256(b"files")
        for path in self.paths:
            everything.update(b"jsonl" if is_jsonl(path) else b"text")
            everything.update((digest or content_digest)(path))
        return everything.hexdigest()


def open_corpus(paths: Sequence[str | Path]) -> Corpus:
    """The corpus of these files, or the embedded one where there are none."""
    return FileCorpus(tuple(Path(path) for path in paths)) if paths else EmbeddedCorpus()


def is_jsonl(path: Path) -> bool:
    return path.suffix.lower() in JSONL_SUFFIXES


def content_digest(path: Path, read: Callable[[int], None] = lambda _: None) -> bytes:
    """SHA-256 of a file's bytes; `read` is told how many more bytes were read."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
            read(len(block))
    return digest.digest()


@dataclass(frozen=True)
class Extent:
    """Whole lines of a UTF-8 file: its bytes from `start` to `stop` (None: its end)."""

    path: Path
    start: int = 0
    stop: int | None = None

    def lines(self) -> Iterator[tuple[int, str]]:
        """Number (from 1, in this extent) and text, with its line end, of every line."""
        left = sys.maxsize if self.stop is None else self.stop - self.start
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            number = 0
            while left > 0 and (raw := stream.readline()):
                number, left = number + 1, left - len(raw)
                try:
                    yield number, raw.decode("utf-8-sig" if self.start == 0 and number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{self.place(number)}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8; "
                        f"convert the file first, as in iconv -f LATIN1 -t UTF-8"
                    ) from None

    def place(self, number: int) -> str:
        """The file, and which of its lines is line `number` of this extent; reads all that stands before it."""
        left, before = self.start, 0
        with self.path.open("rb") as stream:
            while left and (block := stream.read(min(left, _READ_BYTES))):
                left -= len(block)
                before += block.count(b"\n")
        return f"{self.path}: line {before + number}"


def documents_of(extent: Extent, key: str = "text") -> Iterator[str]:
    """The documents in these lines that are not white space alone; `key` is where a jsonl file has the text."""
    documents = _jsonl_documents(extent, key) if is_jsonl(extent.path) else _text_documents(extent)
    return (text for text in documents if text.strip())


def _text_documents(extent: Extent) -> Iterator[str]:
    """Cut at the first blank line past `TEXT_DOCUMENT_CHARS`, or at any line end past twice that."""
    held: list[str] = []
    chars = 0
    for _, line in extent.lines():
        held.append(line)
        chars += len(line)
        if chars >= TEXT_DOCUMENT_CHARS and (not line.strip() or chars >= 2 * TEXT_DOCUMENT_CHARS):
            yield "".join(held)
            held, chars = [], 0
    if held:
        yield "".join(held)


def _jsonl_documents(extent: Extent, key: str) -> Iterator[str]:
    for number, line in extent.lines():
        if line.strip():
            try:
                yield _text_of_record(line, key)
            except DataError as error:
                example = json.dumps({key: "..."})
                raise DataError(
                    f"{extent.place(number)}: {error}; each line must be one JSON object like {example}"
                ) from None


def _text_of_record(line: str, key: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise DataError("not JSON that can be read (nested too deeply)") from None
    if not isinstance(record, dict):
        raise DataError(f"a JSON {type(record).__name__}, not an object")
    if key not in record:
        raise DataError(f"no key {json.dumps(key)} (keys: {', '.join(map(repr, record)) or 'none'})")
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{json.dumps(key)} is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{json.dumps(key)} has half a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character"
        ) from None
    return text
