"""Checkpoints of an engine: every replica writes into `<tag>/replica_<m>/`, under one tag, all of it or nothing.

A save goes into `<tag>.part`, which gets its name when every file of every rank is there and listed with its sum in
`complete.json`; then `latest` is replaced. A load first checks, on all ranks, everything that could be wrong, and only
then changes anything. No file can run code: tensors, plain values and four classes of DeepSpeed are all that is read.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from lordo_ds.adapters.agreement import agreed
from lordo_ds.adapters.patching import replace_method
from lordo_ds.adapters.pipeline import is_pipeline, save_first_replica_only
from lordo_ds.adapters.weights_of_shards import weights_of_shards
from lordo_ds.adapters.zero import stepped_tensors_in_groups
from lordo_ds.checkpoint.files import (
    LATEST,
    PART,
    check_sums,
    file_sum,
    find_tag,
    finish_folder,
    read_complete,
    read_saved,
    recover_folder,
    start_folder,
    unsafe_classes,
    write_complete,
    write_text,
)
from lordo_ds.checkpoint.layout import CheckpointError, refuse_differences
from lordo_ds.checkpoint.native import optimizer_files, read_part, replica_numbers
from lordo_ds.checkpoint.portable import is_portable
from lordo_ds.checkpoint.rng import rng_state, set_rng_state
from lordo_ds.dist.groups import ReplicaGroups, of_all_ranks
from lordo_ds.optimizer import LoRDO

RANKS = "ranks.pt"  # what each rank keeps for itself: random generators, rows that wait for a sync
_CLASSES = {
    f"{made.__module__}.{made.__qualname__}": made
    for made in (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
}
_SAVE = ("save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters")
_LAYER_FILES = (
    ("module_state_dict", ("exclude_frozen_parameters",)),
    ("load_module_state_dict", ("checkpoint", "strict")),
)


def keep_replicas_apart(engine: Any, groups: ReplicaGroups, restart: Callable[[], None], version: str) -> None:
    """Replace the engine's methods that name, save and load checkpoint files.

    DeepSpeed's file names carry the rank inside the data-parallel group, so replicas would overwrite each other. The
    tag stays the same: DeepSpeed compares it over all ranks.

    Args:
        restart: called after weights were loaded without optimizer states.
    """
    folder = f"replica_{groups.replica_index}"

    def inside_replica(original: Any) -> Any:
        @functools.wraps(original)
        def name(checkpoints_path: str, tag: str, *args: Any, **kwargs: Any) -> Any:
            return original(checkpoints_path, os.path.join(str(tag), folder), *args, **kwargs)

        return name

    for method in ("_get_ckpt_name", "_get_rank_zero_ckpt_name"):
        replace_method(engine, method, ("checkpoints_path", "tag"), inside_replica, version)
    if is_pipeline(engine):
        for method, parameters in _LAYER_FILES:
            replace_method(engine, method, parameters, functools.partial(_in_folder, engine, folder), version)
        save_first_replica_only(engine, groups.replica_index, version)
    replace_method(engine.checkpoint_engine, "load", ("path", "map_location"), _without_code, version)
    replace_method(engine, "save_checkpoint", _SAVE, functools.partial(_whole_or_not, engine, groups), version)
    loaded = functools.partial(_checked_first, engine, groups, restart)
    replace_method(engine, "load_checkpoint", ("load_dir", "tag", "load_module_strict"), loaded, version)


def _in_folder(engine: Any, folder: str, original: Any) -> Any:
    """A pipeline writes and reads one file per layer, in a directory that it finds in an attribute."""

    @functools.wraps(original)
    def module_state(*args: Any, **kwargs: Any) -> Any:
        if engine._curr_ckpt_path is None:  # not from save_checkpoint: DeepSpeed says so
            return original(*args, **kwargs)
        engine._curr_ckpt_path = os.path.join(engine._curr_ckpt_path, folder)
        try:
            return original(*args, **kwargs)
        finally:
            engine._curr_ckpt_path = None

    return module_state


def _without_code(original: Any) -> Any:
    @functools.wraps(original)
    def load(path: str, map_location: Any = None) -> Any:
        return read_saved(path, _CLASSES)  # on the host, where everything that DeepSpeed asks for goes first

    return load


# -- saving ------------------------------------------------------------------------------------------


def _whole_or_not(engine: Any, groups: ReplicaGroups, original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        asked = bound.arguments
        if not asked["save_dir"]:
            return original(**asked)  # DeepSpeed says what is wrong
        tag = f"global_step{engine.global_steps}" if asked["tag"] is None else str(asked["tag"])
        target = Path(asked["save_dir"], tag)
        _check_tag(tag)
        agreed(lambda: start_folder(target) if dist.get_rank() == 0 else None)
        with _written(engine.checkpoint_engine) as files:
            result = original(**{**asked, "tag": tag + PART, "save_latest": False})
        part = target.with_name(target.name + PART)
        try:
            mine = agreed(lambda: _account(part, files, groups, engine.basic_optimizer))
        except CheckpointError:  # on all ranks, which have read what they wrote
            if dist.get_rank() == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise
        found = of_all_ranks(mine)
        agreed(lambda: _finish(target, part, found, tag if asked["save_latest"] else None))
        return result

    return save_checkpoint


def _check_tag(tag: str) -> None:
    """Refuse a tag that is none, or not the same everywhere. Collective."""
    tags = of_all_ranks(tag)
    if len(set(tags)) > 1:
        raise CheckpointError(f"LoRDO: the ranks save under different tags, {sorted(set(tags))[:3]}: give all the same")
    if not tag or Path(tag).name != tag:
        raise CheckpointError(f"LoRDO: the tag {tag!r} must be the name of a directory")


@contextmanager
def _written(checkpoint_engine: Any) -> Iterator[list[Path]]:
    """Collects the files that this rank saves."""
    save, files = checkpoint_engine.save, []

    @functools.wraps(save)
    def noted(state_dict: Any, path: str) -> Any:
        files.append(Path(path))
        return save(state_dict, path)

    checkpoint_engine.save = noted
    try:
        yield files
    finally:
        checkpoint_engine.save = save


def _account(part: Path, files: list[Path], groups: ReplicaGroups, optimizer: LoRDO) -> dict[str, Any]:
    """The sums of the files that this rank wrote, and what it keeps for itself.

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
        sums[str(file.relative_to(part))] = file_sum(file)
    assert optimizer.sync is not None
    rows = [list(row) for row in optimizer.sync.rows.pending]
    return {"files": sums, "rank": {"place": _place(groups, optimizer), "rng": rng_state(), "rows": rows}}


def _finish(target: Path, part: Path, found: list[dict[str, Any]], latest: str | None) -> None:
    """Rank 0 declares the checkpoint complete."""
    if dist.get_rank() != 0:
        return
    torch.save([one["rank"] for one in found], part / RANKS)
    sums = {name: pair for one in found for name, pair in one["files"].items()}
    write_complete(part, {**sums, RANKS: file_sum(part / RANKS)})
    finish_folder(target)
    if latest is not None:
        write_text(target.parent / LATEST, latest)
    for left in target.parent.glob(f"*{PART}"):  # by saves that did not finish
        if any(left.glob("replica_*")):
            shutil.rmtree(left, ignore_errors=True)


def _place(groups: ReplicaGroups, optimizer: LoRDO) -> list[int]:
    """(replica, stage, tensor rank, data-parallel rank inside the replica)."""
    return [groups.replica_index, optimizer.pipe_stage, dist.get_rank(groups.tensor), groups.shard_index]


# -- loading -----------------------------------------------------------------------------------------


def _checked_first(engine: Any, groups: ReplicaGroups, restart: Callable[[], None], original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        asked = signature.bind(*args, **kwargs).arguments
        weights_only = not asked.get("load_optimizer_states", True) or asked.get("load_module_only", False)
        tag = common_tag(asked["load_dir"], asked.get("tag"))
        if tag is None:
            return original(*args, **kwargs)  # DeepSpeed warns, and returns nothing
        asked["tag"] = tag
        agreed(lambda: _check(engine, groups, Path(asked["load_dir"]), tag, weights_only))
        if weights_only and engine.zero_optimization_partition_weights():
            path, client_state = weights_of_shards(engine, original)(**asked)
        elif weights_only or not _keeps_states_apart(engine):
            path, client_state = original(**asked)
        else:
            path, client_state = _load_states_kept_apart(engine, original, asked)
        if path is not None and weights_only:
            restart()
        elif path is not None:
            restore_rank(Path(asked["load_dir"], tag), groups, engine.basic_optimizer)
        return path, client_state

    return load_checkpoint


def common_tag(load_dir: str | Path, tag: str | None) -> str | None:
    """The tag to load, the same on all ranks; one that was being replaced when its process died is put back."""

    def recovered() -> None:
        if dist.get_rank() == 0 and (found := find_tag(load_dir, tag)) is not None:
            recover_folder(Path(load_dir, found))

    agreed(recovered)
    tags = of_all_ranks(agreed(lambda: find_tag(load_dir, tag)))
    if len(set(tags)) > 1:
        found = sorted(map(str, set(tags)))
        raise CheckpointError(f"LoRDO: the ranks find different checkpoints in {load_dir}: {found}")
    return tags[0]


def _check(engine: Any, groups: ReplicaGroups, load_dir: Path, tag: str, weights_only: bool) -> None:
    """Everything that this rank's load could stumble over.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    folder, replicas = load_dir / tag, groups.layout.replica_count
    if is_portable(folder):
        raise CheckpointError(
            f"LoRDO: {folder} is a portable checkpoint: load it with "
            "lordo_ds.load_checkpoint(engine, ..., reshape=True)"
        )
    numbers = replica_numbers(folder)
    if folder.is_dir() and not numbers:
        raise CheckpointError(f"LoRDO: {folder} holds no replica_0: it was not saved by LoRDO")
    complete = read_complete(folder)
    if numbers != list(range(replicas)):
        raise CheckpointError(
            f"LoRDO: {folder} holds the replicas {numbers}, this run has {replicas}: resume with as many ranks "
            "and the same optimizer.params.replica_size as it was saved with, or load it with "
            "lordo_ds.load_checkpoint(engine, ..., reshape=True)"
        )
    mine = f"replica_{groups.replica_index}/"
    # The ranks of a replica share its files out: each is read once to be checked.
    names = sorted(name for name in complete.files if name.startswith(mine))
    inside = dist.get_process_group_ranks(groups.inside)
    share = [*names[inside.index(dist.get_rank()) :: len(inside)], RANKS]
    check_sums(folder, complete, share)
    for name in share:
        if name.endswith(".pt"):
            read_saved(folder / name, _CLASSES)  # maps it: what it may not hold shows before anything is changed
    if not weights_only:
        _check_state(engine, load_dir, tag, folder / mine)


def _check_state(engine: Any, load_dir: Path, tag: str, folder: Path) -> None:
    """The optimizer's state that this rank will load fits, tensor for tensor."""
    own = Path(engine._get_ckpt_name(str(load_dir), tag))
    if engine.zero_optimization() or _keeps_states_apart(engine):
        own = Path(engine._get_zero_ckpt_name(str(load_dir), tag))
    optimizer: LoRDO = engine.basic_optimizer
    with stepped_tensors_in_groups(engine):
        if not own.is_file():
            for other in optimizer_files(folder)[:1]:
                refuse_differences(read_part(other).header, optimizer.header(), str(folder))
            raise CheckpointError(f"LoRDO: {own} is missing: was it saved in another layout, or precision?")
        part = read_part(own)
        refuse_differences(part.header, optimizer.header(), str(own))
        optimizer.check_state_dict(part.base)
    if part.masters is not None:
        for layout in part.header.fragments:
            part.weight(layout, {})


def restore_rank(folder: Path, groups: ReplicaGroups, optimizer: LoRDO) -> None:
    """What each rank kept for itself, if the mesh is the one that saved. Collective over all ranks."""
    places = of_all_ranks(_place(groups, optimizer))
    saved = {tuple(one["place"]): one for one in read_saved(folder / RANKS, classes={})}
    if set(saved) != set(map(tuple, places)):
        return
    mine = saved[tuple(places[dist.get_rank()])]
    set_rng_state(mine["rng"])
    assert optimizer.sync is not None
    optimizer.sync.rows.pending = [list(row) for row in mine["rows"]]


def _keeps_states_apart(engine: Any) -> bool:
    """Whether the optimizer is sharded although ZeRO is off: DeepSpeed saves every shard, but loads none of them."""
    return type(engine.optimizer) is BF16_Optimizer and not engine.zero_optimization()


def _load_states_kept_apart(engine: Any, load: Any, asked: dict[str, Any]) -> tuple[str | None, Any]:
    """Load the weights, then the optimizer's shards from the files that ZeRO would use; DeepSpeed 0.19.8 raises."""
    path, client_state = load(**{**asked, "load_optimizer_states": False})
    if path is not None:
        client_state.pop("optimizer", None)
        engine._load_zero_checkpoint(asked["load_dir"], asked["tag"])
    return path, client_state
