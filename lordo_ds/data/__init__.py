"""Text -> sentencepiece -> Megatron `.bin`/`.idx`, cached; with a corpus that comes with every CPython."""

from lordo_ds.data.corpus import DataError
from lordo_ds.data.prepared import DEFAULT_VOCAB, PreparedData, prepare, unigram_entropy
from lordo_ds.data.tokenizer import Tokenizer

__all__ = ["DEFAULT_VOCAB", "DataError", "PreparedData", "Tokenizer", "prepare", "unigram_entropy"]
