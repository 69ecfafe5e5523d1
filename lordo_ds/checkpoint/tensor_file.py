"""Tensors in the safetensors format, written one at a time and read when asked for.

A file is eight bytes (the length n of the header, little-endian), n bytes of JSON (dtype, shape and place of every
tensor), and the tensors. A writer does not know all tensors beforehand, so it leaves room and pads the header with
blanks, which the format allows. Nothing in such a file can run.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lordo_ds.checkpoint.header import LARGEST
from lordo_ds.errors import CheckpointError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ENTRY_BYTES = 160  # of the header, beside the name


class TensorWriter:
    """Writes one file; `expected` are the names of the tensors at most to come."""

    def __init__(self, path: Path, expected: list[str], metadata: dict[str, str] | None = None) -> None:
        self.path = path
        self._header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        room = len(json.dumps(self._header)) + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in expected) + 8
        self._room = -(-room // _ALIGNMENT) * _ALIGNMENT - 8
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(b"\0" * (8 + self._room))
        self._position = 0

    def add(self, name: str, tensor: Tensor) -> int:
        """Append a tensor; returns the CRC-32 of its bytes."""
        data = tensor.detach().cpu().contiguous()
        raw = memoryview(data.reshape(-1).view(torch.uint8).numpy().data) if data.numel() else memoryview(b"")
        stop = self._position + len(raw)
        self._header[name] = {
            "dtype": DTYPES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [self._position, stop],
        }
        self._file.write(raw)
        self._position = stop
        return zlib.crc32(raw)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                header = json.dumps(self._header).encode()
                assert len(header) <= self._room, "more tensors than expected"
                self._file.seek(0)
                self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


class TensorFile:
    """A file to read from; the tensors are mapped."""

    def __init__(self, path: Path) -> None:
        """Check the header.

        Raises:
            CheckpointError: the file is missing, truncated, or of another format.
        """
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                    raise CheckpointError(f"LoRDO: {path} is truncated or no safetensors file")
                header = json.loads(file.read(length))
        except FileNotFoundError:
            raise CheckpointError(f"LoRDO: {path} is missing") from None
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"LoRDO: {path} is damaged or no safetensors file: its header is no JSON") from None
        self._start = 8 + length
        self.entries: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
        self.metadata: dict[str, Any] = {}
        if not isinstance(header, dict):
            raise CheckpointError(f"LoRDO: {path} is damaged: its header is no JSON object")
        for name, entry in header.items():
            if name == "__metadata__":
                self.metadata = entry
                continue
            self.entries[name] = _checked(path, name, entry, size - self._start)
        if sum(stop - start for _, _, start, stop in self.entries.values()) > size - self._start:
            raise CheckpointError(f"LoRDO: {path} is damaged: its tensors are more than it holds")
        self._bytes: Tensor | None = None

    def read(self, name: str) -> Tensor:
        """A tensor, as a view of the mapped file: it is not to be changed."""
        if name not in self.entries:
            raise CheckpointError(f"LoRDO: {self.path} has no tensor {name}")
        dtype, shape, start, stop = self.entries[name]
        if start == stop:
            return torch.zeros(shape, dtype=dtype)
        if self._bytes is None:
            self._bytes = torch.from_file(
                str(self.path), shared=False, size=self.path.stat().st_size, dtype=torch.uint8
            )
        raw = self._bytes[self._start + start : self._start + stop]
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(shape)

    def crc(self, name: str) -> int:
        """CRC-32 of a tensor's bytes."""
        raw = self.read(name).reshape(-1)
        return zlib.crc32(memoryview(raw.view(torch.uint8).numpy().data)) if raw.numel() else 0


def _checked(path: Path, name: str, entry: Any, room: int) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    try:
        dtype, shape = _BY_NAME[entry["dtype"]], tuple(int(size) for size in entry["shape"])
        start, stop = (int(offset) for offset in entry["data_offsets"])
        fits = 0 <= start <= stop <= room and all(0 <= size <= LARGEST for size in shape) and len(shape) <= 64
        fits = fits and math.prod(size for size in shape if size) <= LARGEST
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CheckpointError(f"LoRDO: {path} is damaged: the entry of {name[:80]!r}") from None
    if not fits or stop - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"LoRDO: {path} is truncated or damaged: the place of {name[:80]!r}")
    return dtype, shape, start, stop
