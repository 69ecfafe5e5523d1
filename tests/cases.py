"""Many cases in one launch of ranks, each judged on its own; and what is run once for many tests.

    found = run_cases(trained, 4, {case: (case, 7) for case in CASES})
    found["tied"]           # what trained("tied", 7) returned, by rank; or its failure is raised, or its skip

A launch takes seconds and a case tenths of one, so cases share a launch. A case that fails ends it: what it leaves
behind (peers in a collective, half an engine, patches) is nothing to run another case on. The cases that had not run
get a launch of their own. One that skips itself (`pytest.skip` on every rank) ends nothing.
"""

from __future__ import annotations

import functools
import gc
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from tests.ranks import DEFAULT_TIMEOUT_S, RankFailedError, Skipped, run_ranks, seed_everything, skipped_by, write_whole

Case = TypeVar("Case", bound=Hashable)
Result = TypeVar("Result")


class Found(Mapping[Case, list[Any]]):
    """What each case returned, by rank. Asked for a case that failed or was skipped, it fails or skips the test."""

    def __init__(self, outcomes: dict[Case, Any]) -> None:
        self._outcomes = outcomes

    def __getitem__(self, case: Case) -> list[Any]:
        outcome = self._outcomes[case]
        if isinstance(outcome, Skipped):
            pytest.skip(outcome.reason)
        if isinstance(outcome, RankFailedError):
            raise outcome.with_traceback(None)
        return list(outcome)

    def __contains__(self, case: object) -> bool:
        return case in self._outcomes

    def __iter__(self) -> Iterator[Case]:
        return iter(self._outcomes)

    def __len__(self) -> int:
        return len(self._outcomes)

    def ran(self, case: Case) -> bool:
        """Whether there is a result, that is, neither failed nor skipped."""
        return isinstance(self._outcomes[case], list)


def run_cases(
    fn: Callable[..., Any],
    world_size: int,
    cases: Mapping[Case, tuple[Any, ...]],
    timeout_s: float = DEFAULT_TIMEOUT_S,
    **options: Any,
) -> Found[Case]:
    """Calls `fn(*args)` for the arguments of each case on `world_size` ranks, all of them in one launch if none fails.

    Every case starts from the random state of a fresh rank, so that its result is the same in whatever company.

    Args:
        fn: module-level function.
        cases: name of a case -> its arguments.
        timeout_s: of all launches together. Cases that it leaves no time for fail with that reason.
        options: as for `run_ranks`.

    Raises:
        RankFailedError: where a launch fails outside a case; what a case raises is kept for who asks for it.
    """
    end = time.monotonic() + timeout_s
    outcomes: dict[Case, Any] = {}
    while left := [case for case in cases if case not in outcomes]:
        with tempfile.TemporaryDirectory(prefix="cases-") as name:
            folder = Path(name)
            try:
                arguments = [cases[case] for case in left]
                run_ranks(_run_each, world_size, fn, arguments, name, timeout_s=end - time.monotonic(), **options)
                failure = None
            except RankFailedError as error:
                failure = error
            for index, case in enumerate(left):
                parts = [folder / f"result-{index}-{rank}.pt" for rank in range(world_size)]
                if all(part.exists() for part in parts):
                    outcomes[case] = _outcome([torch.load(part, weights_only=False) for part in parts])
            if failure is not None:
                outcomes[left[_at_fault(folder, failure)]] = failure
        if end - time.monotonic() < 5.0:  # too little for another launch
            for case in left:
                outcomes.setdefault(case, RankFailedError(f"no time was left for it after {failure}", rank=0))
    return Found({case: outcomes[case] for case in cases})


def _run_each(fn: Callable[..., Any], arguments: list[tuple[Any, ...]], folder_name: str) -> None:
    folder, rank = Path(folder_name), dist.get_rank()
    for index, args in enumerate(arguments):
        (folder / f"started-{index}-{rank}").touch()
        seed_everything()
        write_whole(folder / f"result-{index}-{rank}.pt", skipped_by(fn, *args))
        gc.collect()  # engines are cycles, and one that still lives is not the next case's business


def _outcome(parts: list[Any]) -> list[Any] | Skipped | RankFailedError:
    skips = [part for part in parts if isinstance(part, Skipped)]
    if skips and len(skips) < len(parts):
        return RankFailedError(f"{len(skips)} of {len(parts)} ranks skipped the case: {skips[0].reason}", rank=0)
    return skips[0] if skips else parts


def _at_fault(folder: Path, failure: RankFailedError) -> int:
    """The case that the failed rank was in; after a hang, the earliest that any rank was in."""
    at: dict[int, int] = {}
    for path in folder.glob("started-*"):
        _, index, rank = path.name.split("-")
        at[int(rank)] = max(int(index), at.get(int(rank), 0))
    if not at or (failure.rank not in at and not failure.timed_out):
        raise failure  # before the first case
    return min(at.values()) if failure.timed_out else at[failure.rank]


def once(function: Callable[..., Result]) -> Callable[..., Result]:
    """`functools.cache` that also remembers a failure and raises it again: no test starts a failed launch anew."""

    @functools.cache
    def tried(*args: Any, **kwargs: Any) -> tuple[Any, BaseException | None]:
        try:
            return function(*args, **kwargs), None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # pytest's own outcomes too, a timeout among them
            return None, error

    @functools.wraps(function)
    def remembered(*args: Any, **kwargs: Any) -> Result:
        result, error = tried(*args, **kwargs)
        if error is not None:
            raise error.with_traceback(None)
        return result  # type: ignore[no-any-return]

    return remembered
