"""Errors of collectives whose partner is gone, or did not come."""

from __future__ import annotations

import re

import torch.distributed as dist

from lordo_ds.errors import SyncError


def lost_connection(error: BaseException | None) -> bool:
    """Whether a collective failed with it, for want of a partner."""
    if not isinstance(error, RuntimeError) or isinstance(error, SyncError):
        return False
    # gloo's own errors carry the path of its source.
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)


def timed_out(error: RuntimeError) -> bool:
    """Whether it waited in vain, while nobody need be gone."""
    return "timed out" in str(error).lower() or "timeout" in str(error).lower()


def first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]


def gist(error: RuntimeError) -> str:
    """gloo's message without the place in its source and the advice."""
    return re.sub(r"^\[[^]]*\] ", "", first_line(error)).partition(". ")[0]
