"""All ranks act on a checkpoint, or none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lordo_ds.checkpoint.layout import CheckpointError
from lordo_ds.config import ConfigError
from lordo_ds.dist.groups import of_all_ranks

_T = TypeVar("_T")


def agreed(attempt: Callable[[], _T]) -> _T:
    """What the attempt returns, on every rank; or its error on all of them if it fails on one. Collective over all.

    The attempt itself must not communicate: one rank could fail before the others wait for it.

    Raises:
        CheckpointError: with the first rank's message, if it was an error that users are told of.
    """
    result: _T | None = None
    problem, error = "", None
    try:
        result = attempt()
    except (CheckpointError, ConfigError, OSError) as caught:
        problem, error = str(caught) or type(caught).__name__, caught
    first = next((one for one in of_all_ranks(problem) if one), "")
    if problem and problem == first and isinstance(error, CheckpointError):
        raise error
    if first:
        raise CheckpointError(first if first.startswith("LoRDO: ") else f"LoRDO: {first}")
    return result  # type: ignore[return-value]
