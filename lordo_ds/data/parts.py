"""Part files: the tokens of one unit, written whole or not at all, and known by all that decides their bytes.

A part is not flushed to the disk. One that a loss of power has torn does not have its own checksum, and is made anew.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lordo_ds.data.indexed import Lengths, Tokens

DIGEST_BYTES = 16
_MAGIC = b"LORDOP01"
_HEADER = struct.Struct("<8s32sQQQ32s")


@dataclass(frozen=True)
class PartFacts:
    """How much a part holds; bytes are those of the text in UTF-8."""

    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class Part:
    """The documents of one unit.

    Attributes:
        lengths: tokens of each document, its end included, (documents,), int32.
        digests: 128 bits of BLAKE2b of each text, (documents, 16), uint8; (0, 16) where none were asked for.
        tokens: end to end, (sum of lengths,).
    """

    lengths: Lengths
    digests: npt.NDArray[np.uint8]
    tokens: Tokens
    text_bytes: int

    @property
    def facts(self) -> PartFacts:
        return PartFacts(len(self.lengths), len(self.tokens), self.text_bytes)


def part_path(folder: Path, key: bytes) -> Path:
    return folder / f"{key.hex()[:32]}.part"


def write_part(path: Path, key: bytes, part: Part) -> None:
    """Write a part under its name when it is whole; two processes that write the same one do not meet."""
    payload = (
        np.ascontiguousarray(part.lengths, "<i4").tobytes()
        + np.ascontiguousarray(part.digests, np.uint8).tobytes()
        + np.ascontiguousarray(part.tokens).tobytes()
    )
    facts = part.facts
    header = _HEADER.pack(
        _MAGIC, key, facts.documents, facts.tokens, facts.text_bytes, hashlib.sha256(payload).digest()
    )
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(header + payload)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def read_part(path: Path, key: bytes, dtype: np.dtype, with_digests: bool) -> Part | None:
    """The part of this name and key; None where there is none, or none that is whole."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) < _HEADER.size:
        return None
    magic, found, documents, tokens, text_bytes, checksum = _HEADER.unpack_from(raw)
    digests = documents * DIGEST_BYTES * with_digests
    payload = memoryview(raw)[_HEADER.size :]
    if (magic, found) != (_MAGIC, key) or len(payload) != 4 * documents + digests + tokens * dtype.itemsize:
        return None
    if hashlib.sha256(payload).digest() != checksum:
        return None
    lengths = np.frombuffer(payload, "<i4", documents)
    return Part(
        lengths=lengths,
        digests=np.frombuffer(payload, np.uint8, digests, 4 * documents).reshape(-1, DIGEST_BYTES),
        tokens=np.frombuffer(payload, dtype, tokens, 4 * documents + digests),
        text_bytes=text_bytes,
    )


def first_of_each(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which documents are the first with their text: (documents, 16), uint8 -> (documents,)."""
    low, high = np.ascontiguousarray(digests).view("<u8").reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable: equal texts stay in their order
    first = np.ones(len(digests), np.bool_)
    first[order[1:]] = (np.diff(low[order]) != 0) | (np.diff(high[order]) != 0)
    return first
