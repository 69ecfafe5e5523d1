"""What stands in the watchdog's place where nobody watches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lordo_ds.watch.followed import Followed, FollowedReplica
from lordo_ds.watch.liveness import LEFT


class Unwatched:
    """Does nothing: this rank is alone, or its process group has no key-value store."""

    stopped = True

    def follow(self, wire: Followed, inside: FollowedReplica, beside: Sequence[Followed] = ()) -> None:
        pass

    @contextmanager
    def starting(self) -> Iterator[None]:
        yield

    @contextmanager
    def at_the_end_of(self, step: int) -> Iterator[None]:
        yield

    @contextmanager
    def during(self, block: str) -> Iterator[None]:
        yield

    @contextmanager
    def in_flight(self, thread: int | None) -> Iterator[None]:
        yield

    def synced(self, step: int) -> None:
        pass

    def resumed(self, step: int, synced: int) -> None:
        pass

    def stop(self, why: str = LEFT) -> None:
        pass
