"""Held-out tasks for models too small for public benchmarks: three ways to ask whether a model reads.

All items come from the held-out text, are equal for all runs, and are answered without training:

    next_token     the next token is the likeliest one (chance: the commonest token)
    continuation   of four continuations of a passage, one true and three from elsewhere, the true one is the likeliest
    order          a passage is likelier than the same one with two neighbouring tokens swapped
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lab.data import Text

TASKS = ("next_token", "continuation", "order")
CHOICES = 4


def evaluate_tasks(
    text: Text, length: int, vocab: int, logits: Callable[[Tensor], Tensor], items: int
) -> dict[str, float]:
    """Accuracy in each task, and what its simplest rule gets as `<task>_chance`.

    Args:
        length: tokens of a passage.
        logits: (N, T) tokens -> (N, T, vocab), for the token after each.
        items: of each task.
    """
    draw = np.random.default_rng(20_260)
    starts = draw.choice(len(text.held_out) - length - 1, items, replace=False)
    passages = torch.from_numpy(text.held_out[starts[:, None] + np.arange(length + 1)])
    found = {**_next_token(text, passages, vocab, logits), **_continuation(passages, logits, draw)}
    return {**found, **_order(passages, logits, draw)}


def _log_likelihood(tokens: Tensor, logits: Callable[[Tensor], Tensor], start: int = 0) -> Tensor:
    """Sum of the log probabilities of tokens[:, start + 1 :], each given all before it: (N,)."""
    found = []
    for part in tokens.split(128):
        scores = logits(part[:, :-1])[:, start:].log_softmax(-1)
        found.append(scores.gather(-1, part[:, start + 1 :].unsqueeze(-1)).squeeze(-1).sum(-1))
    return torch.cat(found)


def _next_token(text: Text, passages: Tensor, vocab: int, logits: Callable[[Tensor], Tensor]) -> dict[str, float]:
    half = passages.shape[1] // 2
    right = [
        (logits(part[:, :-1])[:, half:].argmax(-1) == part[:, 1 + half :]).double().mean(1)
        for part in passages.split(128)
    ]
    commonest = int(np.bincount(text.train, minlength=vocab).argmax())
    chance = float((passages[:, 1 + half :] == commonest).double().mean())
    return {"next_token": float(torch.cat(right).mean()), "next_token_chance": chance}


def _continuation(passages: Tensor, logits: Callable[[Tensor], Tensor], draw: np.random.Generator) -> dict[str, float]:
    half, n = passages.shape[1] // 2, len(passages)
    scores = [_log_likelihood(passages, logits, half - 1)]
    for _ in range(CHOICES - 1):
        others = (np.arange(n) + draw.integers(1, n, n)) % n
        mixed = torch.cat([passages[:, :half], passages[torch.from_numpy(others)][:, half:]], dim=1)
        scores.append(_log_likelihood(mixed, logits, half - 1))
    best = torch.stack(scores).argmax(0)
    return {"continuation": float((best == 0).double().mean()), "continuation_chance": 1 / CHOICES}


def _order(passages: Tensor, logits: Callable[[Tensor], Tensor], draw: np.random.Generator) -> dict[str, float]:
    swapped = passages.clone()
    for row in swapped:
        places = [i for i in range(len(row) // 2, len(row) - 2) if row[i] != row[i + 1]]
        i = int(draw.choice(places)) if places else 0
        row[i], row[i + 1] = row[i + 1].clone(), row[i].clone()
    won = _log_likelihood(passages, logits) > _log_likelihood(swapped, logits)
    return {"order": float(won.double().mean()), "order_chance": 0.5}
