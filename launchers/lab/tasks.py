"""Held-out tasks for models too small for public benchmarks: three ways to ask whether a model reads.

All items come from the held-out text, are equal for all runs, and are answered without training:

    next_token     the next token is the likeliest one (chance: the commonest token)
    continuation   of four continuations of a passage, one true and three from elsewhere, the true one is the likeliest
    order          a passage is likelier than the same one with two neighbouring tokens swapped
"""

from __future__ import annotations

import csv
import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.data import Text
from lab.results import Row

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


# -- the command: chosen runs again, with tasks at their end ----------------------------------------------

ITEMS = 1000
COLUMNS = (
    "id",
    "cell",
    "method",
    "seed",
    "lr",
    "val_loss",
    "items",
    *(f"{t}{c}" for t in TASKS for c in ("", "_chance")),
)


def read_tasks(path: Path) -> list[dict[str, Any]]:
    """Rows of a tasks file, numbers as numbers; none where there is no file."""
    if not path.exists():
        return []
    names = ("id", "cell", "method")
    with path.open(newline="", encoding="utf-8") as stream:
        return [{k: v if k in names else float(v) for k, v in row.items()} for row in csv.DictReader(stream)]


def run_tasks(rows: list[Row], path: Path, jobs: int, device: str, say: Callable[[str], None]) -> int:
    """Train these rows' runs again, as they were, and answer the tasks; what `path` holds is not run again.

    Returns:
        How many of them did not end with the loss that their row says. They are left out.
    """
    done = {row["id"] for row in read_tasks(path)}
    left = [row for row in rows if row["id"] not in done]
    odd = 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "lab.run"])  # once for all runs
    with context.Pool(jobs, maxtasksperchild=1) as pool, path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if not done and stream.tell() == 0:
            writer.writeheader()
        for row, again in pool.imap_unordered(_again, [(row, device, ITEMS) for row in left]):
            if again["val_loss"] != row["val_loss"]:
                odd += 1
                say(f"{row['id']} ({row['method']}): loss {again['val_loss']} now, {row['val_loss']} then: left out")
                continue
            kept = {key: row[key] for key in ("id", "cell", "method", "seed", "lr", "val_loss")}
            writer.writerow({**kept, "items": ITEMS, **again["tasks"]})
            stream.flush()
            say(f"{row['id']} ({row['method']}, seed {row['seed']}): " + _in_words(again["tasks"]))
    return odd


def _again(given: tuple[Row, str, int]) -> tuple[Row, dict[str, Any]]:
    from lab.run import execute
    from lab.spec import RunSpec

    logging.getLogger("lordo_ds").setLevel(logging.ERROR)
    row, device, items = given
    return row, execute(RunSpec.from_json(row["config"]), device, items)


def _in_words(found: dict[str, float]) -> str:
    return ", ".join(f"{task} {found[task]:.3f}" for task in TASKS)
