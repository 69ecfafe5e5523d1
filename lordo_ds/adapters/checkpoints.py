"""Checkpoints: every replica writes its files into `<tag>/replica_<m>/`, under one tag."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lordo_ds.adapters.patching import replace_method

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

    def inside_replica(original: Any) -> Any:
        @functools.wraps(original)
        def name(checkpoints_path: str, tag: str, *args: Any, **kwargs: Any) -> Any:
            folder = os.path.join(str(tag), f"replica_{replica_index}")
            return original(checkpoints_path, folder, *args, **kwargs)

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
            path, client_state = original(*args, **kwargs)
            if path is not None and weights_only:
                restart()
            return path, client_state

        return load_checkpoint

    for method in ("_get_ckpt_name", "_get_rank_zero_ckpt_name"):
        replace_method(engine, method, ("checkpoints_path", "tag"), inside_replica, version)
    replace_method(engine, "load_checkpoint", ("load_dir", "tag", "load_module_strict"), checked, version)


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
