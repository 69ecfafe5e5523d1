"""What the watchdog knows of the groups that ranks wait for each other in: who is in them, and how much was sent."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist


class Ledger(Protocol):
    @property
    def total_bytes(self) -> int: ...


class Followed(Protocol):
    """One group of ranks; `group` is None where this rank is alone in it."""

    @property
    def group(self) -> dist.ProcessGroup | None: ...

    @property
    def ledger(self) -> Ledger: ...


class FollowedReplica(Protocol):
    """The groups inside a replica."""

    @property
    def shard(self) -> Followed: ...

    @property
    def tensor(self) -> Followed: ...

    @property
    def everyone(self) -> Followed: ...

    @property
    def rows(self) -> Followed: ...
