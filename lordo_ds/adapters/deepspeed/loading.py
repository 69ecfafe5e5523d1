"""Loading an engine: a load first checks, on all ranks, all that could be wrong, and only then changes anything.

No file can run code: tensors, plain values and four classes of DeepSpeed are all that is read.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from lordo_ds.adapters.deepspeed.model_check import check_masters, check_model, trained_weights
from lordo_ds.adapters.deepspeed.saving import RANKS, place_of
from lordo_ds.adapters.deepspeed.weights_of_shards import weights_of_shards
from lordo_ds.adapters.deepspeed.wrappers import stepped_tensors_in_groups
from lordo_ds.checkpoint.deepspeed_files import SavedPart, optimizer_files, read_part
from lordo_ds.checkpoint.files import check_sums, find_tag, read_complete, read_saved
from lordo_ds.checkpoint.finite import NotFinite, not_finite
from lordo_ds.checkpoint.folders import recover_folder
from lordo_ds.checkpoint.header import refuse_differences
from lordo_ds.checkpoint.portable import is_portable
from lordo_ds.checkpoint.replica_folders import replica_numbers
from lordo_ds.checkpoint.rng import set_rng_state
from lordo_ds.comm.agreement import agreed
from lordo_ds.comm.groups import ReplicaGroups, of_all_ranks
from lordo_ds.errors import CheckpointError
from lordo_ds.optimizer import LoRDO
from lordo_ds.saved_state import reseeded_later
from lordo_ds.watch.liveness import LOAD

logger = logging.getLogger("lordo_ds")

_CLASSES = {
    f"{made.__module__}.{made.__qualname__}": made
    for made in (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
}


def read_of_engine(path: str | Path) -> Any:
    """A file that DeepSpeed saved, on the host."""
    return read_saved(path, _CLASSES)


def checked_first(engine: Any, groups: ReplicaGroups, restart: Callable[[], None], original: Any) -> Any:
    """`engine.load_checkpoint`, in those steps.

    Args:
        restart: called after weights were loaded without optimizer states.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        with engine.basic_optimizer.watchdog.during(LOAD):
            return load(*args, **kwargs)

    def load(*args: Any, **kwargs: Any) -> Any:
        asked = signature.bind(*args, **kwargs).arguments
        weights_only = not asked.get("load_optimizer_states", True) or asked.get("load_module_only", False)
        tag = common_tag(asked["load_dir"], asked.get("tag"))
        if tag is None:
            return original(*args, **kwargs)  # DeepSpeed warns, and returns nothing
        asked["tag"] = tag
        strict = asked.get("load_module_strict", True)
        notes, spoilt = agreed(
            lambda: _check(
                engine, groups, Path(asked["load_dir"]), tag, strict, weights_only, asked.get("custom_load_fn")
            )
        )
        tell(Path(asked["load_dir"], tag), notes, spoilt, groups.layout.replica_count, weights_only)
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


def tell(folder: Path, notes: list[str], spoilt: list[NotFinite], replicas: int, weights_only: bool = False) -> None:
    """Say what a load leaves as it is, and which replicas the next sync will reseed. Collective over all ranks.

    Args:
        notes, spoilt: what this rank found.

    Raises:
        CheckpointError: what is not finite cannot be mended by a sync.
    """
    if weights_only:  # every replica gets the weights of the first
        spoilt, replicas = [one for one in spoilt if one.replica == 0], 1
    reseeded = reseeded_later(spoilt, replicas, str(folder))
    everyones = of_all_ranks(notes)
    if dist.get_rank() == 0:
        left = sorted({one for some in everyones for one in some})
        if left:
            more = f", and {len(left) - 1} more" if len(left) > 1 else ""
            logger.warning("LoRDO: %s %s%s: left as it is", folder, left[0], more)
        if reseeded:
            logger.warning(
                "LoRDO: %s: replicas %s are not finite: the next sync leaves them out and gives them the state of the "
                "others",
                folder,
                reseeded,
            )


def _check(
    engine: Any,
    groups: ReplicaGroups,
    load_dir: Path,
    tag: str,
    strict: bool,
    weights_only: bool,
    users_load: Any = None,
) -> tuple[list[str], list[NotFinite]]:
    """Everything that this rank's load could stumble over.

    Args:
        strict: the model must have the names that were saved, and no others.
        users_load: loads the model in place of DeepSpeed; it may expect other names and shapes.

    Returns:
        (what will be left as it is, in words; what is not finite of this rank's).

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
            read_of_engine(folder / name)  # maps it: what it may not hold shows before anything is changed
    part = None if weights_only else _check_state(engine, load_dir, tag, folder / mine)
    notes = [] if users_load else check_model(engine, load_dir, tag, strict, weights_only)
    return notes, _not_finite(engine, groups.replica_index, load_dir, tag, part)


def _not_finite(engine: Any, replica: int, load_dir: Path, tag: str, part: SavedPart | None) -> list[NotFinite]:
    """Of what this rank will load: the weights that are trained, and their states."""
    found: list[NotFinite] = []
    if part is None:
        for name, weight in trained_weights(engine, load_dir, tag):
            found += not_finite(replica, name, {"weight": weight})
        return found
    model = read_of_engine(engine._get_ckpt_name(str(load_dir), tag)) if part.masters is None else {}
    for layout in part.header.fragments:
        # Without masters, the weight of a tied copy is in the file of another stage, which checks it.
        own = None if layout.copied and part.masters is None else part.weight(layout, model)
        found += not_finite(replica, layout.name, {"weight": own, **part.state(layout)})
    return found


def _check_state(engine: Any, load_dir: Path, tag: str, folder: Path) -> SavedPart:
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
    check_masters(engine, part)
    return part


def restore_rank(folder: Path, groups: ReplicaGroups, optimizer: LoRDO) -> None:
    """What each rank kept for itself, if the mesh is the one that saved. Collective over all ranks."""
    places = of_all_ranks(place_of(groups, optimizer))
    saved = {tuple(one["place"]): one for one in read_saved(folder / RANKS, classes={})}
    if set(saved) != set(map(tuple, places)):
        return
    mine = saved[tuple(places[dist.get_rank()])]
    agreed(lambda: set_rng_state(mine["rng"]))
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
