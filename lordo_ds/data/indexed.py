"""Megatron's `.bin` / `.idx` pair, written and read without importing Megatron.

`.bin` holds the tokens of all documents end to end. `.idx`, little endian: 9 bytes "MMIDIDX", version (u64),
dtype code (u8), number of sequences (u64), number of document boundaries (u64), lengths (i32), byte offsets
(i64), boundaries as sequence numbers, the leading 0 included (i64). One document is one sequence here.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from lordo_ds.data.corpus import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}

_COPY_BUFFER_BYTES = 1 << 20
_COPY_DOCUMENTS = 1 << 16

Tokens = npt.NDArray[np.integer]
Lengths = npt.NDArray[np.integer]


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else int32: the two kinds that Megatron's GPT data uses."""
    return _DTYPES[8] if vocab_size <= 1 << 16 else _DTYPES[4]


def bin_path(prefix: Path) -> Path:
    """Where the tokens lie; a prefix may have dots in its name."""
    return prefix.with_name(f"{prefix.name}.bin")


def idx_path(prefix: Path) -> Path:
    """Where the index lies."""
    return prefix.with_name(f"{prefix.name}.idx")


def write_indexed(
    prefix: Path,
    batches: Iterable[tuple[Lengths, Tokens]],
    dtype: np.dtype,
    seed: int,
    chosen: Callable[[], npt.NDArray[np.bool_]] | None = None,
    copied: Callable[[int], None] = lambda _: None,
) -> tuple[int, int]:
    """Write `prefix.bin` and `prefix.idx`, the documents in an order shuffled by `seed`.

    Megatron holds out the last documents of the file: shuffled, they are like the others. The tokens are
    first laid down as they come and then copied in order, so memory holds one batch of documents at a time.

    Args:
        batches: tokens in each of some documents, (documents,), and the tokens themselves, end to end.
        chosen: called after the last batch; which documents are kept, (documents,). None: all.
        copied: told how many more bytes were written; in all each token is written twice.

    Returns:
        The numbers of documents and of tokens written.
    """
    arrival = prefix.with_name(f"{prefix.name}.arrival")
    arrived_sizes = [np.zeros(0, np.int64)]
    with arrival.open("wb") as stream:
        for lengths, tokens in batches:
            stream.write(np.ascontiguousarray(tokens, dtype=dtype).data)
            copied(len(tokens) * dtype.itemsize)
            arrived_sizes.append(np.asarray(lengths, dtype=np.int64))
    sizes = np.concatenate(arrived_sizes)
    kept = np.arange(len(sizes)) if chosen is None else np.flatnonzero(chosen())
    order = np.random.default_rng(seed).permutation(kept)
    starts = _starts(sizes)
    with bin_path(prefix).open("wb", buffering=_COPY_BUFFER_BYTES) as stream:
        for first in range(0, len(order), _COPY_DOCUMENTS):
            some = order[first : first + _COPY_DOCUMENTS]
            copied(_copy_documents(arrival, stream, starts[some] * dtype.itemsize, sizes[some] * dtype.itemsize))
    arrival.unlink()
    _write_index(idx_path(prefix), sizes[order], dtype)
    return len(order), int(sizes[order].sum())


def _copy_documents(
    arrival: Path, written: BinaryIO, starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> int:
    """Copy ranges of bytes of a file, in the order given, end to end; returns how many bytes."""
    if not sizes.any():
        return 0
    with arrival.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as arrived:
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            written.write(arrived[start : start + size])
    return int(sizes.sum())


def _write_index(path: Path, lengths: npt.NDArray[np.int64], dtype: np.dtype) -> None:
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    count = len(lengths)
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, _VERSION, code, count, count + 1))
        stream.write(lengths.astype("<i4").tobytes())
        stream.write((_starts(lengths) * dtype.itemsize).astype("<i8").tobytes())
        stream.write(np.arange(count + 1, dtype="<i8").tobytes())


def read_lengths(prefix: Path) -> tuple[npt.NDArray[np.int32], np.dtype]:
    """Tokens per document, in file order, and the tokens' dtype; everything the index says is checked.

    Raises:
        DataError: the index is not one, is damaged, or does not fit the tokens beside it.
    """
    index, tokens = idx_path(prefix), bin_path(prefix)
    try:
        raw, token_bytes = index.read_bytes(), tokens.stat().st_size
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    if len(raw) < _HEADER.size:
        raise DataError(f"{index}: {len(raw)} bytes are too few for the header of a Megatron index")
    magic, version, code, count, boundaries = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != _VERSION or code not in _DTYPES:
        raise DataError(f"{index}: not a Megatron index of version {_VERSION} with tokens of uint16 or int32")
    expected = _HEADER.size + count * (4 + 8) + boundaries * 8
    if boundaries != count + 1 or len(raw) != expected:
        raise DataError(f"{index}: {len(raw)} bytes, but its header announces {expected}: it is damaged")
    lengths = np.frombuffer(raw, dtype="<i4", count=count, offset=_HEADER.size)
    offsets = np.frombuffer(raw, dtype="<i8", count=count, offset=_HEADER.size + 4 * count)
    documents = np.frombuffer(raw, dtype="<i8", count=boundaries, offset=_HEADER.size + 12 * count)
    dtype = _DTYPES[code]
    if (lengths < 0).any() or not np.array_equal(documents, np.arange(count + 1)):
        raise DataError(f"{index}: its lengths or document boundaries are damaged")
    if not np.array_equal(offsets, _starts(lengths) * dtype.itemsize):
        raise DataError(f"{index}: its offsets do not follow from its lengths: it is damaged")
    if int(lengths.sum(dtype=np.int64)) * dtype.itemsize != token_bytes:
        raise DataError(f"{tokens}: {token_bytes} bytes are not what {index.name} describes: one of them is damaged")
    return lengths, dtype


def _starts(lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    if not len(lengths):
        return np.zeros(0, np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[:-1], dtype=np.int64)])
