"""`PREFIX.manifest.json`: what token files were made of, and the checksums that they must have."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from lordo_ds.data.corpus import DataError, content_digest
from lordo_ds.disk import write_text

SUFFIXES = (".bin", ".idx", ".model")
"""Of the files that lie beside a manifest: tokens, index and sentencepiece model."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class FileFacts(_Strict):
    bytes: NonNegativeInt
    sha256: str


class SourceFacts(_Strict):
    name: str
    kind: str
    bytes: NonNegativeInt
    sha256: str
    documents: NonNegativeInt
    text_bytes: NonNegativeInt


class Manifest(_Strict):
    """All plain values; the same text and settings give the same manifest.

    Attributes:
        made_of: SHA-256 of everything that decides the bytes of the files.
        text_bytes: of all documents in the sources, duplicates included, in UTF-8.
        duplicates: how many documents were left out because an earlier one has the same text.
        files: by suffix, see `SUFFIXES`.
        own_sha256: of all else in it, see `sealed`.
    """

    format: Literal[1] = 1
    made_of: str
    documents: PositiveInt
    tokens: PositiveInt
    text_bytes: PositiveInt
    vocab_size: PositiveInt
    duplicates: NonNegativeInt
    versions: dict[str, str]
    sources: list[SourceFacts]
    files: dict[str, FileFacts]
    own_sha256: str = ""

    def sealed(self) -> Manifest:
        """The same with its own checksum."""
        rest = self.model_dump_json(exclude={"own_sha256"})
        return self.model_copy(update={"own_sha256": hashlib.sha256(rest.encode()).hexdigest()})


def manifest_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.manifest.json")


def data_path(prefix: Path, suffix: str) -> Path:
    """One of the files of a prefix, whose name may have dots in it."""
    return prefix.with_name(prefix.name + suffix)


def write_manifest(prefix: Path, manifest: Manifest) -> None:
    """On the disk when this returns: it says that all else is."""
    write_text(manifest_path(prefix), manifest.sealed().model_dump_json(indent=1) + "\n")


def read_manifest(prefix: Path) -> Manifest:
    """Read it, and check that the files are there and as long as it says.

    Raises:
        DataError: naming the file, and what is wrong with it.
    """
    path = manifest_path(prefix)
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; lordo data makes it, with the token files") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: not a manifest of lordo data ({where}: {first['msg']}); make the files anew"
        ) from None
    if manifest != manifest.sealed() or set(manifest.files) != set(SUFFIXES):
        raise DataError(f"{path}: has changed since it was made; copy it again, or make the files anew")
    for suffix, facts in manifest.files.items():
        file = data_path(prefix, suffix)
        if not file.is_file():
            raise DataError(f"{file}: no such file, but {path.name} names it; copy all four files, or make them anew")
        if file.stat().st_size != facts.bytes:
            raise DataError(
                f"{file}: {file.stat().st_size} bytes, but {path.name} says {facts.bytes}: "
                "copy it again, or make the files anew"
            )
    return manifest


def file_facts(path: Path, read: Callable[[int], None] = lambda _: None) -> FileFacts:
    """What a manifest says of a file; `read` is told how many more bytes were read."""
    return FileFacts(bytes=path.stat().st_size, sha256=content_digest(path, read).hex())


def verify(prefix: Path, read: Callable[[int], None] = lambda _: None) -> Manifest:
    """Read all files of a prefix and compare them with its manifest; `read` is told how many more bytes were read.

    Raises:
        DataError: naming the first file that is not what it was.
    """
    manifest = read_manifest(prefix)
    for suffix, facts in manifest.files.items():
        path = data_path(prefix, suffix)
        if content_digest(path, read).hex() != facts.sha256:
            raise DataError(f"{path}: its bytes have changed since it was made; copy it again, or make the files anew")
    return manifest
