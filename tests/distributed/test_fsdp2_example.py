"""The example of `fully_shard` trains, and the replicas end up equal."""

from __future__ import annotations

import contextlib
import io
import re
import sys

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def example(*arguments: str) -> str:
    import fsdp2_example

    sys.argv = ["fsdp2_example.py", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        fsdp2_example.main()
    return said.getvalue()


def test_the_example_trains_on_two_replicas_of_two_shards() -> None:
    """It makes the process group itself, as torchrun's variables say."""
    first, *others = run_ranks(example, 4, "--shards", "2", "--steps", "16", init_process_group=False, timeout_s=90)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+), ", first, re.MULTILINE)]
    sent = [float(size) for size in re.findall(r"([\d.]+) MiB sent", first)]
    assert len(losses) == len(sent) == 3, first  # steps 1, 8 and 16
    assert losses[0] > 5.0 > losses[-1] and sent[0] < sent[1] < sent[2]
    assert not any("loss" in text for text in others)
