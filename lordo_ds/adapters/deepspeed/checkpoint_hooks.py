"""Checkpoints of an engine: every replica writes into `<tag>/replica_<m>/`, under one tag, all of it or nothing.

Here are the engine's methods that name, save and load files; how it is done, `saving` and `loading` beside it tell.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from lordo_ds.adapters.deepspeed.loading import checked_first, read_of_engine
from lordo_ds.adapters.deepspeed.model_check import leave_what_was_not_saved
from lordo_ds.adapters.deepspeed.pipeline import is_pipeline, save_first_replica_only
from lordo_ds.adapters.deepspeed.saving import SAVE_PARAMETERS, whole_or_not
from lordo_ds.adapters.patching import replace_method
from lordo_ds.comm.agreement import agreed
from lordo_ds.comm.groups import ReplicaGroups

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
    else:  # a pipeline's loads synchronise tied weights
        method, parameters = _LAYER_FILES[1]
        replace_method(engine, method, parameters, functools.partial(leave_what_was_not_saved, engine=engine), version)
        replace_method(engine, "_load_checkpoint", ("load_dir", "tag"), _on_all_ranks, version)
    replace_method(engine, "_load_zero_checkpoint", ("load_dir", "tag"), _on_all_ranks, version)
    replace_method(engine.checkpoint_engine, "load", ("path", "map_location"), _without_code, version)
    saved = functools.partial(whole_or_not, engine, groups)
    replace_method(engine, "save_checkpoint", SAVE_PARAMETERS, saved, version)
    loaded = functools.partial(checked_first, engine, groups, restart)
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
        return read_of_engine(path)  # on the host, where everything that DeepSpeed asks for goes first

    return load


def _on_all_ranks(original: Any) -> Any:
    """A step of DeepSpeed's load that does not communicate: where it fails on one rank, all raise."""

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        return agreed(lambda: original(*args, **kwargs))

    return load
