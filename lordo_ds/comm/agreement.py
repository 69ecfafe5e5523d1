"""All ranks act on a checkpoint, or none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from lordo_ds.comm.groups import of_all_ranks
from lordo_ds.errors import CheckpointError, ConfigError

_T = TypeVar("_T")
_TOLD = (CheckpointError, ConfigError, OSError)


def agreed(attempt: Callable[[], _T]) -> _T:
    """What the attempt returns, on every rank; or its error on all of them if it fails on one. Collective over all.

    The attempt itself must not communicate: one rank could fail before the others wait for it. Whatever it raises
    counts: a damaged file, and the code of others that reads it, can raise anything, and the others wait here.

    Raises:
        CheckpointError: with the first rank's message.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return attempt()
    result: _T | None = None
    problem: str = ""
    error: Exception | None = None
    try:
        result = attempt()
    except _TOLD as caught:
        problem, error = str(caught) or type(caught).__name__, caught
    except Exception as caught:
        problem, error = f"{type(caught).__name__}: {' '.join(str(caught).split())}", caught
    first = next((one for one in of_all_ranks(problem) if one), "")
    if problem and problem == first and isinstance(error, CheckpointError):
        raise error
    if first:
        raise CheckpointError(first if first.startswith("LoRDO: ") else f"LoRDO: {first}") from error
    return result  # type: ignore[return-value]
