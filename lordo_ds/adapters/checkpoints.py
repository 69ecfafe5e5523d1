"""Checkpoints: every replica writes its files into `<tag>/replica_<m>/`, under one tag."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from lordo_ds.adapters.patching import replace_method
from lordo_ds.adapters.pipeline import is_pipeline, save_first_replica_only

_FOLDER = re.compile(r"replica_(\d+)")


def keep_replicas_apart(
    engine: Any, replica_index: int, replicas: int, restart: Callable[[], None], version: str
) -> None:
    """Replace the engine's checkpoint-name methods, and check what it is asked to load.

    DeepSpeed's file names carry the rank inside the data-parallel group, so replicas would overwrite each other. The
    tag stays the same: DeepSpeed compares it over all ranks, and global rank 0 alone writes `latest`.

    Args:
        restart: called after weights were loaded without optimizer states.
    """

    folder = f"replica_{replica_index}"

    def inside_replica(original: Any) -> Any:
        @functools.wraps(original)
        def name(checkpoints_path: str, tag: str, *args: Any, **kwargs: Any) -> Any:
            return original(checkpoints_path, os.path.join(str(tag), folder), *args, **kwargs)

        return name

    def checked(original: Any) -> Any:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            asked = signature.bind(*args, **kwargs).arguments
            weights_only = not asked.get("load_optimizer_states", True) or asked.get("load_module_only", False)
            if weights_only and engine.zero_optimization_partition_weights():
                raise ValueError(
                    "LoRDO: DeepSpeed 0.19.8 cannot load weights without optimizer states at stage 3 from this layout: "
                    "load the optimizer states too, or build the model from the plain weights that "
                    "zero_to_fp32.py makes with --tag <tag>/replica_0"
                )
            _check_folders(asked["load_dir"], asked.get("tag"), replicas)
            if weights_only or not _keeps_states_apart(engine):
                path, client_state = original(*args, **kwargs)
            else:
                path, client_state = _load_states_kept_apart(engine, original, asked)
            if path is not None and weights_only:
                restart()
            return path, client_state

        return load_checkpoint

    for method in ("_get_ckpt_name", "_get_rank_zero_ckpt_name"):
        replace_method(engine, method, ("checkpoints_path", "tag"), inside_replica, version)
    if is_pipeline(engine):
        for method, parameters in _LAYER_FILES:
            replace_method(engine, method, parameters, functools.partial(_in_folder, engine, folder), version)
        save_first_replica_only(engine, replica_index, version)
    replace_method(engine, "load_checkpoint", ("load_dir", "tag", "load_module_strict"), checked, version)


# -- pipelines ---------------------------------------------------------------------------------------

_LAYER_FILES = (
    ("module_state_dict", ("exclude_frozen_parameters",)),
    ("load_module_state_dict", ("checkpoint", "strict")),
)


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


def _keeps_states_apart(engine: Any) -> bool:
    """Whether the optimizer is sharded although ZeRO is off: DeepSpeed saves every shard, but loads none of them."""
    return type(engine.optimizer) is BF16_Optimizer and not engine.zero_optimization()


def _load_states_kept_apart(engine: Any, load: Any, asked: dict[str, Any]) -> tuple[str | None, Any]:
    """Load the weights, then the optimizer's shards from the files that ZeRO would use; DeepSpeed 0.19.8 raises."""
    path, client_state = load(**{**asked, "load_optimizer_states": False})
    if path is not None:
        client_state.pop("optimizer", None)
        tag = asked.get("tag") or Path(asked["load_dir"], "latest").read_text().strip()
        engine._load_zero_checkpoint(asked["load_dir"], tag)
    return path, client_state


# -- checks ------------------------------------------------------------------------------------------


def _check_folders(load_dir: str, tag: str | None, replicas: int) -> None:
    """Refuse a checkpoint of another number of replicas; a missing one is left to DeepSpeed, which says so."""
    if tag is None:
        latest = Path(load_dir, "latest")
        if not latest.is_file():
            return
        tag = latest.read_text().strip()
    folder = Path(load_dir, str(tag))
    if not folder.is_dir():
        return
    found = sorted(int(match[1]) for match in map(_FOLDER.fullmatch, os.listdir(folder)) if match)
    if not found:
        raise ValueError(f"LoRDO: {folder} holds no replica_0: it was not saved by LoRDO")
    if found != list(range(replicas)):
        raise ValueError(
            f"LoRDO: {folder} holds the replicas {found}, this run has {replicas}: resume with as many ranks "
            "and the same optimizer.params.replica_size as it was saved with"
        )
