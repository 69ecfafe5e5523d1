"""Weights without optimizer states at ZeRO stage 3, where only the optimizer's files hold them.

DeepSpeed 0.19.8 would put them together from all files of the checkpoint, which it looks for without the replicas'
folders. Here each shard takes its own part from its own file, as when the states are loaded too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lordo_ds.adapters.deepspeed.wrappers import stepped_tensors_in_groups
from lordo_ds.checkpoint.deepspeed_files import read_part
from lordo_ds.checkpoint.header import FragmentLayout
from lordo_ds.comm.agreement import agreed
from lordo_ds.errors import CheckpointError


def weights_of_shards(engine: Any, load: Callable[..., Any]) -> Callable[..., Any]:
    """`engine.load_checkpoint` for a call that wants no optimizer states, at stage 3. Collective.

    Raises:
        CheckpointError: on all ranks, before anything is changed, if the shards were cut otherwise.
    """

    def load_checkpoint(**asked: Any) -> tuple[str | None, Any]:
        agreed(lambda: _check_places(engine, asked["load_dir"], asked["tag"]))
        wrapper, shards = engine.optimizer, engine._load_zero_checkpoint
        scaler = wrapper.loss_scaler, wrapper.dynamic_loss_scale

        def without_states(load_dir: str, tag: str, load_optimizer_states: bool = False) -> Any:
            return shards(load_dir, tag, load_optimizer_states=False)

        engine._load_zero_checkpoint = without_states
        try:
            # Asked for without states, DeepSpeed would look for the files by itself.
            path, client_state = load(**{**asked, "load_optimizer_states": True})
            if path is not None and asked.get("load_module_only", False):
                without_states(asked["load_dir"], asked["tag"])
        finally:
            engine._load_zero_checkpoint = shards
        wrapper.loss_scaler, wrapper.dynamic_loss_scale = scaler
        return path, client_state

    return load_checkpoint


def _check_places(engine: Any, load_dir: str, tag: str) -> None:
    file = Path(engine._get_zero_ckpt_name(load_dir, tag))
    if not file.is_file():
        raise CheckpointError(f"LoRDO: {file} is missing: was it saved in another layout, or precision?")
    part = read_part(file)
    with stepped_tensors_in_groups(engine):
        ours = engine.basic_optimizer.header().fragments
    for saved, mine in zip(part.header.fragments, ours, strict=False):
        if _place(saved) != _place(mine):
            break
    else:
        if len(part.header.fragments) == len(ours):
            for layout in part.header.fragments:
                part.weight(layout, {})
            return
    raise CheckpointError(
        f"LoRDO: {file} holds other parameters, or cut into other shards, than this run: load it where the model, "
        "optimizer.params.replica_size and the precision are those it was saved with, or build the model from the "
        "plain weights that `lordo ckpt export` makes"
    )


def _place(layout: FragmentLayout) -> tuple[Any, ...]:
    return layout.name, tuple(layout.shape), tuple(layout.interval), layout.tensor, layout.offset
