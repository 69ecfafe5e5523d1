"""Where a run of `pretrain_gpt.py` goes on: anew, from its last checkpoint, or with fewer replicas than it had."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from pretrain.launch import check_equal_on_all_ranks, dist_rank, say, shut_down
from pretrain.parallel import check_saved_sizes
from pretrain.run_log import EveryStepHook, RunLog

RESUME_CHOICES = ("always", "auto")


def load_checkpoint(args: argparse.Namespace, engine: Any, hook: Any) -> dict[str, Any]:
    """Load the last checkpoint if `--resume` says so. Collective.

    `--resume` needs one; `--resume auto` starts anew where there is none, and ends the program where nothing is left to
    do. A job that torchrun has restarted does as with `--resume auto`.

    Returns:
        The client state that was saved; zeros for a new run.
    """
    folder = args.output_dir / "checkpoints"
    exists = (folder / "latest").exists()
    check_equal_on_all_ranks(exists, f"{folder} is not as on rank 0: give --output-dir on a file system that all share")
    restarted = _was_restarted()
    resume = args.resume or ("auto" if restarted else None)
    if resume == "always" and not exists:
        raise ValueError(f"--resume: no checkpoint in {folder}; leave --resume away to start anew")
    if resume is None or not exists:
        if restarted:
            say(f"restarted by the launcher before the first save: from the start ({folder} holds no checkpoint)")
        _put_aside(folder)
        return {"step": 0, "consumed_samples": 0, "waiting_rows": []}
    client = _load(args, engine, hook, folder)
    missing = sorted({"step", "consumed_samples", "waiting_rows"} - set(client))
    if missing:
        raise ValueError(f"--resume: {folder} was not saved by pretrain_gpt.py: its client state has no {missing[0]!r}")
    if client["step"] >= args.train_steps:
        if resume == "auto":
            say(f"{folder} is at step {client['step']}: nothing is left to do")
            shut_down()
            sys.exit(0)
        raise ValueError(f"--resume: {folder} is at step {client['step']} already; give a larger --train-steps")
    say(f"resumed from step {client['step']}")
    return client


def _was_restarted() -> bool:
    """Whether a launcher has started some rank again; each node's agent counts its own. Collective."""
    import torch.distributed as dist

    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    return any(counts)


def _load(args: argparse.Namespace, engine: Any, hook: Any, folder: Path) -> dict[str, Any]:
    """With another number of replicas, as after the loss of a node, they all start from what was saved."""
    import lordo_ds

    saved = len(list((folder / (folder / "latest").read_text().strip()).glob("replica_*")))
    if lordo_ds.hook(engine) is not None and saved not in (0, hook.replicas):
        say(f"saved by {saved} replica(s), {hook.replicas} go on")
        _, client = lordo_ds.load_checkpoint(engine, str(folder), reshape=True)
        return dict(client)
    check_saved_sizes(folder, args.tensor_parallel, args.pipeline_parallel)
    _, client = engine.load_checkpoint(str(folder))
    return dict(client)


def saves_up_to(folder: Path, step: int) -> list[int]:
    """The steps of the saves that a run which goes on from `step` has made."""
    found = (re.fullmatch(r"global_step(\d+)", path.name) for path in folder.glob("global_step*"))
    return sorted(number for match in found if match and (number := int(match[1])) <= step)


def drop_saves(folder: Path, steps: list[int]) -> None:
    """Delete them, on rank 0, but not what a save has not made, nor what somebody has put into one."""
    from lordo_ds.checkpoint.folders import remove_save
    from lordo_ds.errors import CheckpointError

    if dist_rank() == 0:
        for step in steps:
            try:
                remove_save(folder / f"global_step{step}")
            except (CheckpointError, OSError) as error:
                say(f"--keep-saves: not deleted: {error}")


def write_rows_that_nobody_averages(log: RunLog, hook: Any) -> None:
    """Rows that waited for a sync of several replicas, of which one is left, keep the values of rank 0."""
    if isinstance(hook, EveryStepHook):
        log.flush([{} for _ in log.waiting])


def _put_aside(folder: Path) -> None:
    """A new run in an old directory: after a crash, its checkpoints must not be taken for the new run's."""
    latest = folder / "latest"
    if dist_rank() == 0 and latest.exists():
        os.replace(latest, folder / "latest_of_earlier_run")
        say(f"{latest} named a checkpoint of an earlier run: it is now latest_of_earlier_run")
