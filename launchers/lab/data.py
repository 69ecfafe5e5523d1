"""Tokens of an experiment: who trains on what, a fixed validation set, and the losses of models that barely look.

The tokens of step n depend on (seed, n) only, and replica m of M takes the m-th part of the global batch: all methods,
and all divisions of the same global batch, see the same tokens in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lordo_ds.data import prepare

VALIDATION_FRACTION = 0.05


@dataclass(frozen=True)
class Text:
    """Training and held-out tokens of the embedded corpus; whole documents are held out."""

    train: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float
    fingerprint: str

    def batch(self, seed: int, step: int, replicas: int, sequences: int, length: int) -> Tensor:
        """The global batch of step `step`: (replicas, sequences / replicas, length + 1)."""
        draws = np.random.default_rng([seed, step]).integers(0, len(self.train) - length - 1, sequences)
        rows = self.train[draws[:, None] + np.arange(length + 1)]
        return torch.from_numpy(rows).view(replicas, sequences // replicas, length + 1)

    def validation(self, sequences: int, length: int) -> Tensor:
        """`sequences` windows spread evenly over the held-out text; equal for all runs: (sequences, length + 1)."""
        starts = np.linspace(0, len(self.held_out) - length - 1, sequences).astype(np.int64)
        return torch.from_numpy(self.held_out[starts[:, None] + np.arange(length + 1)])


@lru_cache(maxsize=2)
def open_text(vocab: int) -> Text:
    """The embedded corpus in a vocabulary of this size, tokenized once per machine."""
    data = prepare((), vocab, say=lambda line: None)
    documents = data.held_out(VALIDATION_FRACTION)
    held_out = data.validation_tokens(documents)
    everything = np.memmap(data.prefix.with_suffix(".bin"), dtype=held_out.dtype, mode="r")
    train = everything[: len(everything) - len(held_out)].astype(np.int64)
    return Text(train, held_out.astype(np.int64), data.text_bytes / data.tokens, data.key)


def context_free_losses(text: Text, windows: Tensor, vocab: int) -> tuple[float, float]:
    """Loss on the windows' labels of a unigram and of a bigram model of the training tokens, nats per token.

    A model that has not passed the second one has learnt little but which token follows which. The bigram falls back
    to the unigram with weight 1 of a pseudo-count (Dirichlet smoothing).
    """
    counts = np.bincount(text.train, minlength=vocab) + 1.0
    unigram = counts / counts.sum()
    pairs = np.bincount(text.train[:-1] * vocab + text.train[1:], minlength=vocab * vocab).reshape(vocab, vocab)
    bigram = (pairs + unigram) / (pairs.sum(1, keepdims=True) + 1.0)
    before, after = windows[:, :-1].numpy().ravel(), windows[:, 1:].numpy().ravel()
    return float(-np.log(unigram[after]).mean()), float(-np.log(bigram[before, after]).mean())
