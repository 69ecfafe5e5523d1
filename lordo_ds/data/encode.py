"""What the processes of `lordo data` do: tokenize a unit into a part file, train a tokenizer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np

from lordo_ds.data.corpus import DataError
from lordo_ds.data.indexed import Tokens, token_dtype
from lordo_ds.data.parts import DIGEST_BYTES, Part, PartFacts, write_part
from lordo_ds.data.tokenizer import Tokenizer, train_tokenizer
from lordo_ds.data.units import Source, Unit

_BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class EncodeTask:
    """One unit, and where its tokens go."""

    source: Source
    unit: Unit
    model_path: Path
    part_path: Path
    part_key: bytes
    with_digests: bool


def encode_unit(task: EncodeTask) -> PartFacts:
    """Tokenize the documents of a unit, each with its end, and write them as a part."""
    tokenizer = _tokenizer(task.model_path)
    dtype = token_dtype(tokenizer.vocab_size)
    tokens: list[Tokens] = [np.zeros(0, dtype)]
    digests: list[bytes] = []
    text_bytes = 0
    for texts in _batches(task.source.documents(task.unit)):
        for text, ids in zip(texts, tokenizer.tokenize_all(texts, threads=1), strict=True):
            raw = text.encode()
            text_bytes += len(raw)
            tokens.append(np.array([*ids, tokenizer.eod], dtype))
            if task.with_digests:
                digests.append(hashlib.blake2b(raw, digest_size=DIGEST_BYTES).digest())
    part = Part(
        lengths=np.array([len(one) for one in tokens[1:]], np.int32),
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES),
        tokens=np.concatenate(tokens),
        text_bytes=text_bytes,
    )
    write_part(task.part_path, task.part_key, part)
    return part.facts


@lru_cache(maxsize=1)
def _tokenizer(model_path: Path) -> Tokenizer:
    return Tokenizer(model_path)


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(documents, _BATCH_DOCUMENTS)):
        yield batch


@dataclass(frozen=True)
class TrainTask:
    """What a tokenizer is trained on, and where its model goes."""

    text: Sequence[tuple[Source, Unit]]
    vocab_size: int
    model_path: Path


def train_model(task: TrainTask) -> None:
    """Write a sentencepiece model, whole or not at all."""
    documents = chain.from_iterable(source.documents(unit) for source, unit in task.text)
    model = train_tokenizer(documents, task.vocab_size)
    if not model:
        raise DataError(f"sentencepiece made no model of {task.vocab_size} pieces; give more text")
    write_whole(task.model_path, model)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under its name when it is whole."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(content)
    unfinished.replace(path)
