"""The files that DeepSpeed 0.19.8 writes for each replica, read offline: stages 0-3, both engines.

The optimizer's state, and the weights that it steps, lie in

    stage 0, fp32               mp_rank_*_model_states.pt: optimizer; weights in `module`, of pipelines in layer files
    stage 0, bf16 and fp16      the same, with one fp32 master per parameter
    stages 1-3, BF16_Optimizer  *_optim_states.pt of every shard, with flat fp32 masters
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lordo_ds.checkpoint.bounds import is_held
from lordo_ds.checkpoint.files import read_saved
from lordo_ds.checkpoint.header import FragmentLayout, Header
from lordo_ds.errors import CheckpointError


@dataclass(frozen=True)
class SavedPart:
    """What one rank saved of the optimizer. `masters` are the tensors it steps; None: the model's own parameters."""

    path: Path
    header: Header
    base: dict[str, Any]
    masters: list[Tensor] | None
    wrapper: dict[str, Any]

    def weight(self, layout: FragmentLayout, model: Mapping[str, Any]) -> Tensor:
        start, stop = layout.interval
        if self.masters is not None:
            if layout.tensor >= len(self.masters):
                raise CheckpointError(f"LoRDO: {self.path} has no weights of {layout.name}: it is damaged")
            master = self.masters[layout.tensor].detach()
            self._check_whole(master if master.dim() > 1 else None, layout)
            found = master.reshape(-1)[layout.offset : layout.offset + stop - start]
        else:
            whole = self._in_model(layout.name, model).detach()
            self._check_whole(whole, layout)
            found = whole.reshape(-1)
        if not found.is_floating_point():
            raise CheckpointError(f"LoRDO: {self.path}: the weight of {layout.name} is {found.dtype}: it is damaged")
        if found.numel() != stop - start:
            raise CheckpointError(
                f"LoRDO: {self.path} holds {found.numel()} elements of {layout.name}, not {stop - start}: it is damaged"
            )
        return found

    def _check_whole(self, weight: Tensor | None, layout: FragmentLayout) -> None:
        """One that is kept in its shape must have it: a transposed one has as many elements."""
        if weight is not None and tuple(weight.shape) != layout.shape:
            raise CheckpointError(
                f"LoRDO: {self.path}: the weight of {layout.name} is {tuple(weight.shape)}, not {layout.shape}: it is "
                "damaged"
            )

    def _in_model(self, name: str, model: Mapping[str, Any]) -> Tensor:
        found = self.entry(name, model)
        if found is None or not is_held(found):
            raise CheckpointError(f"LoRDO: {self.path} has no weight {name}, or not all of it: it is damaged")
        return found

    def entry(self, name: str, model: Mapping[str, Any]) -> Tensor | None:
        """A parameter or buffer of the model as DeepSpeed saved it; None where it did not."""
        place = self.header.engine.places.get(name)
        entries = checked_dict(model.get("module"), self.path) if place is None else _layer(self.path.parent, place[0])
        found = entries.get(name if place is None else place[1])
        return found if isinstance(found, Tensor) else None

    def state(self, layout: FragmentLayout) -> dict[str, Any]:
        found = checked_dict(self.base.get("state"), self.path).get(layout.tensor)
        return checked_dict(checked_dict(found, self.path).get(layout.name), self.path)


def optimizer_files(folder: Path) -> Sequence[Path]:
    return sorted(folder.glob("*_optim_states.pt")) or sorted(folder.glob("mp_rank_*_model_states.pt"))


def model_file(optimizer_file: Path) -> Path:
    """The model's file beside an optimizer's: one per shard at stage 3, else one for all shards."""
    name = optimizer_file.name
    if not name.endswith("_optim_states.pt"):
        return optimizer_file
    own = optimizer_file.with_name(name.removeprefix("bf16_").replace("_optim_states", "_model_states"))
    if own.is_file():
        return own
    return optimizer_file.with_name("mp_rank_" + name.partition("mp_rank_")[2].replace("_optim_", "_model_"))


def read_part(path: Path) -> SavedPart:
    """The optimizer's state in a file.

    Raises:
        CheckpointError: there is none of LoRDO.
    """
    found = checked_dict(read_saved(path), path)
    if path.name.endswith("_optim_states.pt"):
        wrapper = checked_dict(found.get("optimizer_state_dict"), path)
        base = wrapper.get("base_optimizer_state", wrapper.get("optimizer_state_dict"))
        masters = wrapper.get("single_partition_of_fp32_groups", wrapper.get("fp32_flat_groups"))
    else:
        wrapper = checked_dict(found.get("optimizer"), path)
        base, masters = wrapper.get("optimizer_state_dict"), wrapper.get("fp32_groups")
        if base is None:
            base = wrapper
        elif isinstance(masters, list):
            masters = [master for group in masters for master in group]
    header = Header.of(base, str(path))
    if masters is not None and not all(isinstance(master, Tensor) for master in masters):
        raise CheckpointError(f"LoRDO: {path} is damaged: its masters are no tensors")
    if not all(map(is_held, masters or ())):
        raise CheckpointError(f"LoRDO: {path} is damaged: its masters are larger than the file")
    return SavedPart(path, header, checked_dict(base, path), masters, wrapper)


def checked_dict(found: Any, path: Path) -> dict[Any, Any]:
    """What was found in a file, which must be a dict.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(found, dict):
        raise CheckpointError(f"LoRDO: {path} is not a file of this kind of checkpoint, or is damaged")
    return found


def _layer(folder: Path, name: str) -> dict[Any, Any]:
    if Path(name).name != name:
        raise CheckpointError(f"LoRDO: {folder} names a file {name!r} outside of it: it is damaged")
    return checked_dict(read_saved(folder / name), folder / name)
