"""Many cases in one launch: a failure stays with its case, a skip says why, and nothing that failed is tried again."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import once, run_cases
from tests.ranks import RankFailedError, run_ranks

pytestmark = pytest.mark.distributed


def behave(what: str, folder: str) -> tuple[int, int, float]:
    """What a case may do to the launch it is in; returns its rank, its process, and a random number."""
    with open(Path(folder) / f"{what}.{dist.get_rank()}", "a") as calls:
        calls.write("called\n")
    if what == "raises on one rank" and dist.get_rank() == 1:
        raise ZeroDivisionError("the real cause")
    if what == "raises on all":
        raise KeyError("on every rank")
    if what == "dies" and dist.get_rank() == 0:
        os._exit(7)
    if what == "skips":
        pytest.skip("not on this machine")
    if what == "skips on one rank" and dist.get_rank() == 1:
        pytest.skip("not on this rank")
    if what == "skips on one rank":
        return 0, 0, 0.0
    if what == "hangs" and dist.get_rank() == 1:
        time.sleep(600)
    dist.all_reduce(torch.ones(1))
    return dist.get_rank(), os.getpid(), float(torch.rand(()))


def cases(tmp_path: Path, *names: str) -> dict[str, tuple[str, str]]:
    return {name: (name.rstrip("123"), str(tmp_path)) for name in names}


def test_a_case_that_fails_leaves_the_others_to_be_judged_on_their_own(tmp_path: Path) -> None:
    names = ("good1", "raises on one rank", "good2", "skips", "good3", "raises on all", "dies", "skips on one rank")
    found = run_cases(behave, 2, cases(tmp_path, *names), timeout_s=60)
    assert list(found) == list(names)
    for good in ("good1", "good2", "good3"):
        assert [rank for rank, _, _ in found[good]] == [0, 1]
        assert [draw for _, _, draw in found[good]] == [found["good1"][0][2]] * 2, "each starts as a fresh rank does"
    for name, message in {
        "raises on one rank": "rank 1 raised:(.|\n)*ZeroDivisionError: the real cause",
        "raises on all": "KeyError: 'on every rank'",
        "dies": "rank 0 exited with code 7",
        "skips on one rank": "1 of 2 ranks skipped the case: not on this rank",
    }.items():
        for _ in range(2):  # as often as it is asked for
            with pytest.raises(RankFailedError, match=message):
                found[name]
        assert not found.ran(name)
    with pytest.raises(pytest.skip.Exception, match="not on this machine"):
        found["skips"]
    # A failure costs the others a new launch, and not more.
    assert found["good1"][0][1] != found["good2"][0][1] == found["good3"][0][1]
    for name in ("good", "skips"):
        assert (tmp_path / f"{name}.0").read_text().count("called") == (3 if name == "good" else 1)


def test_a_case_that_hangs_is_named_and_what_it_left_no_time_for_says_so(tmp_path: Path) -> None:
    run_ranks(dist.get_rank, 1)  # the fork server's start does not count
    found = run_cases(behave, 2, cases(tmp_path, "good1", "hangs", "good2"), timeout_s=6)
    assert found.ran("good1")
    with pytest.raises(RankFailedError, match=r"did not finish within(.|\n)*in behave"):
        found["hangs"]
    with pytest.raises(RankFailedError, match=r"no time was left for it after ranks .* did not finish"):
        found["good2"]


def fail_at_once() -> None:
    raise KeyError("before any case")


def test_a_launch_that_fails_is_not_started_anew_by_each_test() -> None:
    launches = []

    @once
    def launched(ranks: int) -> Any:
        launches.append(ranks)
        return run_ranks(fail_at_once if ranks == 1 else dist.get_rank, ranks)

    for _ in range(3):
        with pytest.raises(RankFailedError, match="before any case"):
            launched(1)
        assert launched(2) == [0, 1]
    assert launches == [1, 2]


def skip_on(ranks: list[int]) -> None:
    if dist.get_rank() in ranks:
        pytest.skip("for a reason")


def test_ranks_skip_a_test_together_or_fail_it() -> None:
    with pytest.raises(pytest.skip.Exception, match="for a reason"):
        run_ranks(skip_on, 2, [0, 1])
    with pytest.raises(RankFailedError, match=r"rank 1 skipped .*, others did not"):
        run_ranks(skip_on, 2, [1])


def asked_for(dtype: str, supported: bool) -> str:
    from deepspeed.accelerator import get_accelerator

    from tests.engines import settings, skip_where_fp16_is_refused

    get_accelerator().is_fp16_supported = lambda: supported
    skip_where_fp16_is_refused(settings(dtype))
    return "runs"


@pytest.mark.deepspeed
def test_fp16_is_skipped_with_the_reason_exactly_where_deepspeed_refuses_it() -> None:
    asked = [(dtype, supported) for dtype in ("fp32", "bf16", "fp16") for supported in (True, False)]
    found = run_cases(asked_for, 1, {case: case for case in asked})
    with pytest.raises(pytest.skip.Exception, match="DeepSpeed refuses fp16 here: oneDNN has no fp16 on this CPU"):
        found["fp16", False]
    assert [case for case in asked if found.ran(case)] == [case for case in asked if case != ("fp16", False)]
