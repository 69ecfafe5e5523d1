"""A sentencepiece tokenizer trained on the corpus itself, lossless but for U+2581 (read back as a space)."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from lordo_ds.data.corpus import DataError

UNK, EOD, PAD = 0, 1, 2
SMALLEST_VOCAB = 512
"""3 control pieces and 256 bytes, then room for the commonest characters and a few merges."""

_SAMPLE_CHARS = 4_000_000
_LONGEST_LINE_CHARS = 4_096


class Tokenizer:
    """Text to ids and back; also what Megatron's `GPTDatasetConfig(tokenizer=...)` asks of a tokenizer.

    `eod` ends a document and `pad` never occurs in data, so Megatron masks nothing by accident; it is -1 in a
    model without such a piece.
    """

    def __init__(self, model_path: str | Path) -> None:
        self.model_path = Path(model_path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{model_path}: not a sentencepiece model ({' '.join(str(error).split())})") from None
        self.vocab_size: int = self._model.get_piece_size()
        self.eod: int = self._model.eos_id()
        self.pad: int = self._model.pad_id()
        if self.eod < 0:
            raise DataError(
                f"{model_path}: has no piece that ends a document (eos_id is {self.eod}); train it with --eos_id, or "
                "let lordo_ds train one"
            )
        # Megatron hashes these into the names of its index files.
        self.unique_identifiers = OrderedDict(
            [("class", type(self).__name__), ("tokenizer_path", str(self.model_path.resolve()))]
        )

    def tokenize(self, text: str) -> list[int]:
        return list(self._model.encode(text))

    def tokenize_all(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """As `tokenize` on each text, on all cores or so many; the ids do not depend on how many there are."""
        return list(self._model.encode(list(texts), num_threads=threads or os.cpu_count() or 1))

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._model.decode([int(token) for token in ids]))


def check_vocab_size(vocab_size: int) -> None:
    """Raise `DataError` where a vocabulary is too small whatever the text."""
    if vocab_size < SMALLEST_VOCAB:
        raise DataError(f"vocab_size {vocab_size}: must be at least {SMALLEST_VOCAB} (256 bytes, characters, pieces)")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """Train byte-pair encoding on a sample of the lines; the same documents give the same model.

    Text is not normalised, runs of spaces may become one piece (code is indented), and what the vocabulary
    lacks is spelt in bytes, so nothing is unknown. A small corpus may end with fewer pieces than asked for.

    Returns:
        The serialized sentencepiece model.

    Raises:
        DataError: the vocabulary is too small for the characters of the text.
    """
    check_vocab_size(vocab_size)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample_lines(documents)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9995,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _LONGEST_LINE_CHARS,  # bytes
            unk_id=UNK,
            bos_id=-1,
            eos_id=EOD,
            eos_piece="<eod>",
            pad_id=PAD,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"sentencepiece cannot train {vocab_size} pieces on this text ({reason}); "
            "set the model's vocab_size higher, or give more text"
        ) from None
    return model.getvalue()


def _sample_lines(documents: Iterable[str]) -> list[str]:
    """Every k-th line, k the power of two that keeps the sample near `_SAMPLE_CHARS`; no randomness."""
    stride, sample, chars = 1, [], 0
    for number, line in enumerate(_training_lines(documents)):
        if number % stride:
            continue
        sample.append(line)
        chars += len(line)
        if chars > 2 * _SAMPLE_CHARS:
            stride, sample = 2 * stride, sample[::2]
            chars = sum(map(len, sample))
    return sample


def _training_lines(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        for line in text.replace("\0", "").split("\n"):
            if line.strip():
                for start in range(0, len(line), _LONGEST_LINE_CHARS):
                    yield line[start : start + _LONGEST_LINE_CHARS]
