"""Saving an engine: what all ranks write appears under its tag, whole, or not at all.

1. rank 0 begins `.<tag>.lordo-part` (lordo_ds.checkpoint.folders), and every rank sees what it wrote there
2. DeepSpeed writes its files into it; each rank flushes and sums those that it wrote
3. rank 0 sees each file, and another node than the writer's has read it (lordo_ds.adapters.shared_folder)
4. rank 0 flushes the directories, then writes `complete.json`, then the name, then `latest`
5. what had the name before goes, now that losing power would not lose the new one
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lordo_ds.adapters.shared_folder import check_files, check_shared, host_view
from lordo_ds.checkpoint.files import LATEST, file_sum, unsafe_classes, write_complete
from lordo_ds.checkpoint.folders import MARK, NewFolder
from lordo_ds.checkpoint.rng import rng_state
from lordo_ds.comm.agreement import agreed
from lordo_ds.comm.groups import ReplicaGroups, of_all_ranks
from lordo_ds.disk import flush_file, flush_folders, is_reserved, part_of, write_text
from lordo_ds.errors import CheckpointError
from lordo_ds.optimizer import LoRDO
from lordo_ds.watch.liveness import SAVE

RANKS = "ranks.pt"  # what each rank keeps for itself: random generators, rows that wait for a sync
SAVE_PARAMETERS = ("save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters")


def whole_or_not(engine: Any, groups: ReplicaGroups, original: Any) -> Any:
    """`engine.save_checkpoint`, in those steps."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        with engine.basic_optimizer.watchdog.during(SAVE):
            return save(*args, **kwargs)

    def save(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        asked = bound.arguments
        if not asked["save_dir"]:
            return original(**asked)  # DeepSpeed says what is wrong
        tag = f"global_step{engine.global_steps}" if asked["tag"] is None else str(asked["tag"])
        _check_tag(tag)
        target = Path(os.path.abspath(asked["save_dir"]), tag)
        part = part_of(target)
        new = agreed(lambda: NewFolder(target) if dist.get_rank() == 0 else None)
        try:
            check_shared(part / MARK, None if new is None else new.claim.owner.token, target.parent)
            with _written(engine.checkpoint_engine) as files:
                result = original(**{**asked, "tag": part.name, "save_latest": False})
            mine = agreed(lambda: _account(part, files, groups, engine.basic_optimizer))
            found = of_all_ranks(mine)
            agreed(lambda: check_files(part, [one["files"] for one in found], [one["view"] for one in found]))
            agreed(lambda: _finish(new, found, tag if asked["save_latest"] else None))
        except CheckpointError:  # on all ranks: nobody writes any more
            if new is not None:
                new.abandon()
            raise
        return result

    return save_checkpoint


def _check_tag(tag: str) -> None:
    """Refuse a tag that is none, or not the same everywhere. Collective."""
    tags = of_all_ranks(tag)
    if len(set(tags)) > 1:
        raise CheckpointError(f"LoRDO: the ranks save under different tags, {sorted(set(tags))[:3]}: give all the same")
    if not tag or Path(tag).name != tag:
        raise CheckpointError(f"LoRDO: the tag {tag!r} must be the name of a directory")
    if tag == LATEST or is_reserved(tag):
        raise CheckpointError(f"LoRDO: the tag {tag!r} is the name of a file that saving needs: choose another")


@contextmanager
def _written(checkpoint_engine: Any) -> Iterator[list[Path]]:
    """Collects the files that this rank saves."""
    save, files = checkpoint_engine.save, []

    @functools.wraps(save)
    def noted(state_dict: Any, path: str) -> Any:
        files.append(Path(os.path.abspath(path)))
        return save(state_dict, path)

    checkpoint_engine.save = noted
    try:
        yield files
    finally:
        checkpoint_engine.save = save


def _account(part: Path, files: list[Path], groups: ReplicaGroups, optimizer: LoRDO) -> dict[str, Any]:
    """Put the files that this rank wrote on the disk; their sums, and what it keeps for itself.

    Raises:
        CheckpointError: a file could not be loaded again.
    """
    sums = {}
    for file in dict.fromkeys(files):
        unsafe = unsafe_classes(file)
        if unsafe:
            raise CheckpointError(
                f"LoRDO: the checkpoint would hold an object of {unsafe[0]}, and loading runs no code: give "
                "client_state tensors and plain values only"
            )
        flush_file(file)
        sums[str(file.relative_to(part))] = file_sum(file)
    assert optimizer.sync is not None
    rows = [list(row) for row in optimizer.sync.rows.pending]
    own = {"place": place_of(groups, optimizer), "rng": rng_state(), "rows": rows}
    return {"files": sums, "view": host_view(), "rank": own}


def _finish(new: NewFolder | None, found: list[dict[str, Any]], latest: str | None) -> None:
    """Rank 0 declares the checkpoint complete."""
    if new is None:
        return
    torch.save([one["rank"] for one in found], new.path / RANKS)
    sums = {name: pair for one in found for name, pair in one["files"].items()}
    for path in sorted(new.path.rglob("*")):  # and what DeepSpeed copied there, if it did
        name = str(path.relative_to(new.path))
        if name not in sums and name != MARK and path.is_file():
            flush_file(path)
            sums[name] = file_sum(path)
    flush_folders(new.path)
    write_complete(new.path, sums)
    new.finish()
    if latest is not None:
        write_text(new.target.parent / LATEST, latest)
    new.remove_old()


def place_of(groups: ReplicaGroups, optimizer: LoRDO) -> list[int]:
    """(replica, stage, tensor rank, data-parallel rank inside the replica)."""
    return [groups.replica_index, optimizer.pipe_stage, dist.get_rank(groups.tensor), groups.shard_index]
