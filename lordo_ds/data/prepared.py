"""Text -> sentencepiece -> Megatron `.bin`/`.idx`, once per content and settings."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from lordo_ds.data.cache import build_once, default_cache, remembered_digest
from lordo_ds.data.corpus import Corpus, DataError, open_corpus
from lordo_ds.data.indexed import bin_path, idx_path, read_lengths, token_dtype, write_indexed
from lordo_ds.data.manifest import SUFFIXES, data_path, file_facts, manifest_path, read_manifest
from lordo_ds.data.tokenizer import Tokenizer, train_tokenizer

DEFAULT_VOCAB = 4096

_FORMAT = 1
"""Raise it when the same text and settings would give other files."""
_SHUFFLE_SEED = 0
_BATCH_DOCUMENTS = 256
_INFO = ("documents", "tokens", "text_bytes", "vocab_size")


@dataclass(frozen=True)
class PreparedData:
    """A tokenized corpus in the cache; equal on all processes that were given the same text and settings."""

    folder: Path
    """In the cache: where what is derived of the tokens may be kept."""
    prefix: Path
    """What Megatron calls the data path: the `.bin` and `.idx` names without their suffix."""
    tokenizer_path: Path
    key: str
    documents: int
    tokens: int
    text_bytes: int
    vocab_size: int

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer_path)

    def held_out(self, fraction: float = 0.05, min_tokens: int = 0) -> int:
        """How many of the last documents to validate on: `fraction` of the tokens, `min_tokens` at least.

        Raises:
            DataError: the documents are too few or too short to leave `min_tokens` on both sides.
        """
        lengths, _ = read_lengths(self.prefix)
        from_the_end = np.cumsum(lengths[::-1], dtype=np.int64)
        count = int(np.searchsorted(from_the_end, max(fraction * self.tokens, min_tokens))) + 1
        held = int(from_the_end[min(count, len(lengths)) - 1])
        if count >= self.documents or self.tokens - held < min_tokens:
            raise DataError(
                f"the data has {self.documents} documents and {self.tokens} tokens: too few to hold out "
                f"whole documents of {min_tokens} tokens and train on as many; give more text"
            )
        return count

    def validation_tokens(self, documents: int) -> npt.NDArray[np.integer]:
        """The tokens of the last `documents` documents."""
        lengths, dtype = read_lengths(self.prefix)
        return np.memmap(bin_path(self.prefix), dtype=dtype, mode="r")[-int(lengths[-documents:].sum()) :]


def prepare(
    paths: Sequence[str | Path] = (),
    vocab_size: int = DEFAULT_VOCAB,
    cache: Path | None = None,
    say: Callable[[str], None] = print,
) -> PreparedData:
    """Tokenize these files, or the embedded corpus where there are none, or find that done in the cache.

    The prefix of token files that `lordo data` has made stands for them. Needs no process group: processes on one
    machine meet at the cache's lock. `say` gets progress lines.

    Raises:
        DataError: a file, or a setting, that cannot be used.
    """
    cache = cache or default_cache()
    made = [path for path in map(Path, paths) if _is_prefix(path)]
    if made and len(paths) > 1:
        raise DataError(f"{made[0]}: token files are given alone; lordo data makes one set of any number of sources")
    if made:
        return _open_made(made[0], vocab_size, cache)
    corpus = open_corpus(paths)
    key = _key(corpus, vocab_size, cache, say)

    def build(folder: Path) -> None:
        say(f"tokenizing {corpus.name} (once; kept in {folder.parent})")
        started = time.perf_counter()
        info = _build(folder, corpus, vocab_size)
        say(
            f"tokenized {info['documents']} documents, {info['tokens']} tokens in {time.perf_counter() - started:.1f} s"
        )

    folder = build_once(cache / f"data-{key}", build, say)
    return _open(folder, key)


def _is_prefix(path: Path) -> bool:
    """Whether token files begin with this name, and no file has it."""
    return not path.is_file() and (manifest_path(path).exists() or idx_path(path).exists())


def _open_made(prefix: Path, vocab_size: int, cache: Path) -> PreparedData:
    """What `lordo data` has made, for a model of `vocab_size` pieces.

    Raises:
        DataError: a file is missing or damaged, as far as the index and sizes tell, or the model has too few pieces.
    """
    manifest = read_manifest(prefix)
    read_lengths(prefix)
    if file_facts(data_path(prefix, ".model")) != manifest.files[".model"]:
        raise DataError(f"{data_path(prefix, '.model')}: has changed since it was made; copy it again")
    key = hashlib.sha256(json.dumps([manifest.files[one].sha256 for one in SUFFIXES]).encode()).hexdigest()[:20]
    if manifest.vocab_size > vocab_size:
        raise DataError(
            f"{prefix}: has tokens of {manifest.vocab_size} pieces, more than the model's vocab_size {vocab_size}: "
            f"raise that, or make the files with --train-tokenizer {vocab_size}"
        )
    return PreparedData(
        folder=cache / f"made-{key}",
        prefix=prefix,
        tokenizer_path=data_path(prefix, ".model"),
        key=key,
        documents=manifest.documents,
        tokens=manifest.tokens,
        text_bytes=manifest.text_bytes,
        vocab_size=manifest.vocab_size,
    )


def _open(folder: Path, key: str) -> PreparedData:
    """Check that everything in the folder fits together.

    Raises:
        DataError: naming what is damaged; deleting the folder has it made anew.
    """
    remedy = f"delete {folder} to have it made anew"
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        if set(info) != set(_INFO) or not all(type(value) is int and value > 0 for value in info.values()):
            raise ValueError(f"expected positive numbers for {', '.join(_INFO)}")
        data = PreparedData(folder, folder / "tokens", folder / "tokenizer.model", key, **info)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder / 'info.json'}: {' '.join(str(error).split())}; {remedy}") from None
    try:
        lengths, _ = read_lengths(data.prefix)
        vocab_size = data.tokenizer().vocab_size
    except DataError as error:
        raise DataError(f"{error}; {remedy}") from None
    found = {"documents": len(lengths), "tokens": int(lengths.sum(dtype=np.int64)), "vocab_size": vocab_size}
    for name, value in found.items():
        if value != info[name]:
            raise DataError(f"{folder}: {value} {name}, but info.json says {info[name]}; {remedy}")
    return data


def unigram_entropy(tokens: npt.NDArray[np.integer]) -> float:
    """Entropy in nats per token of the tokens' own frequencies; its exponential is a perplexity.

    No model that ignores context has a lower mean loss on these tokens.
    """
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    return float(-(shares * np.log(shares)).sum())


def _key(corpus: Corpus, vocab_size: int, cache: Path, say: Callable[[str], None]) -> str:
    fingerprint = corpus.fingerprint(lambda path: remembered_digest(path, cache, say))
    settings = [_FORMAT, sentencepiece.__version__, vocab_size, fingerprint]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:20]


def _build(folder: Path, corpus: Corpus, vocab_size: int) -> dict[str, int]:
    """Fill `folder` with tokenizer.model, tokens.bin, tokens.idx and info.json."""
    model_path = folder / "tokenizer.model"
    model_path.write_bytes(train_tokenizer(corpus.documents(), vocab_size))
    tokenizer = Tokenizer(model_path)
    seen = {"documents": 0, "text_bytes": 0}

    def tokenized() -> Iterator[tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]]:
        stream = corpus.documents()
        while batch := list(islice(stream, _BATCH_DOCUMENTS)):
            for text, ids in zip(batch, tokenizer.tokenize_all(batch), strict=True):
                seen["documents"] += 1
                seen["text_bytes"] += len(text.encode())
                yield np.array([len(ids) + 1]), np.array([*ids, tokenizer.eod])

    _, tokens = write_indexed(folder / "tokens", tokenized(), token_dtype(tokenizer.vocab_size), _SHUFFLE_SEED)
    info = {**seen, "tokens": tokens, "vocab_size": tokenizer.vocab_size}
    (folder / "info.json").write_text(json.dumps(info))
    return info
