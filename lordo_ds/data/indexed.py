"""Megatron's `.bin` / `.idx` pair, written and read without importing Megatron.

`.bin` holds the tokens of all documents end to end. `.idx`, little endian: 9 bytes "MMIDIDX", version (u64),
dtype code (u8), number of sequences (u64), number of document boundaries (u64), lengths (i32), byte offsets
(i64), boundaries as sequence numbers, the leading 0 included (i64). One document is one sequence here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lordo_ds.data.corpus import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}

Tokens = npt.NDArray[np.integer]


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else int32: the two kinds that Megatron's GPT data uses."""
    return _DTYPES[8] if vocab_size <= 1 << 16 else _DTYPES[4]


def write_indexed(prefix: Path, documents: Iterable[Tokens], dtype: np.dtype, seed: int) -> int:
    """Write `prefix.bin` and `prefix.idx`, the documents in an order shuffled by `seed`.

    Megatron holds out the last documents of the file: shuffled, they are like the others. The tokens are
    first laid down as they come and then copied in order, so memory holds one document at a time.

    Returns:
        The number of tokens written.
    """
    arrival = prefix.with_suffix(".arrival")
    lengths = []
    with arrival.open("wb") as stream:
        for tokens in documents:
            stream.write(np.asarray(tokens, dtype=dtype).tobytes())
            lengths.append(len(tokens))
    sizes = np.array(lengths, dtype=np.int64)
    starts = _starts(sizes)
    order = np.random.default_rng(seed).permutation(len(sizes))
    arrived = np.memmap(arrival, dtype=dtype, mode="r")
    with prefix.with_suffix(".bin").open("wb") as stream:
        for document in order:
            stream.write(arrived[starts[document] : starts[document] + sizes[document]].tobytes())
    del arrived
    arrival.unlink()
    _write_index(prefix.with_suffix(".idx"), sizes[order], dtype)
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
    index, tokens = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
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
