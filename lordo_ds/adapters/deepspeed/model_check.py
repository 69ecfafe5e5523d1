"""What DeepSpeed will load into the model and its masters, compared with them before anything is changed.

DeepSpeed 0.19.8 loads the model's file with torch's `load_state_dict`, which raises only after it has changed what
fits, frozen parameters by `copy_`, which broadcasts, and masters likewise.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deepspeed.runtime.utils import is_optimized_parameter
from torch import Tensor

from lordo_ds.adapters.deepspeed.pipeline import is_pipeline
from lordo_ds.adapters.deepspeed.wrappers import stepped_tensors
from lordo_ds.checkpoint.deepspeed_files import SavedPart
from lordo_ds.checkpoint.files import read_saved
from lordo_ds.errors import CheckpointError

FROZEN = "frozen_param_fragments"
_ALLOW = "give the model that it was saved with, or load_module_strict=False to load the rest"


def check_model(engine: Any, load_dir: Path, tag: str, strict: bool, only_weights: bool) -> list[str]:
    """Compare names, shapes and dtypes of parameters and buffers with the files that this rank will load.

    Args:
        strict: names must be the same too; otherwise the differences are returned, in words.
        only_weights: the floating-point precision may differ.

    Raises:
        CheckpointError: with the name, and both shapes.
    """
    notes: list[str] = []
    for file, saved, live in _files(engine, load_dir, tag):
        notes += _compare(file, saved, live, strict, only_weights)
    return notes


def trained_weights(engine: Any, load_dir: Path, tag: str) -> Iterator[tuple[str, Tensor]]:
    """The trained parameters in the files that this rank will load, by the names that they have there."""
    for _, saved, live in _files(engine, load_dir, tag):
        for name, ours in live.items():
            if getattr(ours, "requires_grad", False) and isinstance(saved.get(name), Tensor):
                yield name, saved[name]


def check_masters(engine: Any, part: SavedPart) -> None:
    """Compare the full-precision weights that DeepSpeed will copy into its own.

    Raises:
        CheckpointError: their number, or a shape or dtype, differs.
    """
    if part.masters is None:
        return
    live = stepped_tensors(engine)
    if len(part.masters) != len(live):
        raise CheckpointError(f"LoRDO: {part.path} holds {len(part.masters)} master tensors, this run has {len(live)}")
    for number, (saved, ours) in enumerate(zip(part.masters, live, strict=True)):
        # Flat ones are saved without their padding, and padded again; that they hold every parameter is checked apart.
        shorter = saved.dim() == ours.dim() == 1 and saved.dtype == ours.dtype and saved.numel() <= ours.numel()
        if _kind(saved) != _kind(ours) and not shorter:
            raise CheckpointError(
                f"LoRDO: {part.path}: master tensor {number} is {_kind(saved)} in the checkpoint and {_kind(ours)} here"
            )


def leave_what_was_not_saved(original: Any, engine: Any) -> Any:
    """Without `strict`, frozen parameters that the file lacks keep their values; DeepSpeed 0.19.8 raises."""

    @functools.wraps(original)
    def load_module_state_dict(checkpoint: Any, strict: bool = True, **options: Any) -> Any:
        if not strict and isinstance(checkpoint.get(FROZEN), Mapping):
            checkpoint = {**checkpoint, FROZEN: {**_frozen(engine), **checkpoint[FROZEN]}}
        return original(checkpoint, strict=strict, **options)

    return load_module_state_dict


def _files(engine: Any, load_dir: Path, tag: str) -> Iterator[tuple[Path, Mapping[Any, Any], Mapping[str, Any]]]:
    """Of every file: its path, what it holds of the model, and what this engine has under those names."""
    path = Path(engine._get_ckpt_name(str(load_dir), tag))
    model = read_saved(path)
    module = _mapping(model, path).get("module")
    if not is_pipeline(engine):
        yield path, _mapping(module, path), engine.module.state_dict(keep_vars=True)
        if model.get(FROZEN) is not None:
            yield path, _mapping(model[FROZEN], path), _frozen(engine)
        return
    if module is not None and not isinstance(module, str):
        raise CheckpointError(f"LoRDO: {path} holds a whole model, not that of a pipeline's stage: it is damaged")
    for index, layer in enumerate(engine.module.forward_funcs):
        if hasattr(layer, "load_state_dict"):
            file = Path(engine.module.ckpt_layer_path(str(path.parent), index))
            yield file, _mapping(read_saved(file), file), layer.state_dict(keep_vars=True)


def _mapping(found: Any, path: Path) -> Mapping[Any, Any]:
    if not isinstance(found, Mapping):
        raise CheckpointError(f"LoRDO: {path} is not a model's file, or is damaged")
    return found


def _frozen(engine: Any) -> dict[str, Tensor]:
    """What DeepSpeed saves and loads of the parameters that no optimizer steps: at stage 3 this rank's partitions."""
    return {
        engine.param_names[parameter]: getattr(parameter, "ds_tensor", parameter)
        for parameter in engine.module.parameters()
        if not is_optimized_parameter(parameter)
    }


def _compare(
    file: Path, saved: Mapping[Any, Any], live: Mapping[str, Any], strict: bool, only_weights: bool
) -> list[str]:
    notes = []
    for name in sorted(live.keys() ^ saved.keys(), key=str):
        what = f"has no {name!r}, which this model has" if name in live else f"holds {name!r}, which this model has not"
        if strict:
            raise CheckpointError(f"LoRDO: {file} {what}: {_ALLOW}")
        notes.append(what)
    for name in live.keys() & saved.keys():
        if isinstance(live[name], Tensor) and not _fits(saved[name], live[name], only_weights):
            raise CheckpointError(
                f"LoRDO: {file}: {name} is {_kind(saved[name])} in the checkpoint and {_kind(live[name])} in this "
                "model: give the model that it was saved with"
            )
    return notes


def _fits(saved: Any, live: Tensor, any_precision: bool) -> bool:
    if not isinstance(saved, Tensor):
        return False
    if any_precision and saved.is_floating_point() and live.is_floating_point():
        return _shape(saved) == _shape(live)
    return _kind(saved) == _kind(live)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Of what is saved: ZeRO-3's parameters leave an empty place in the model's file, gathered or not."""
    return (0,) if hasattr(tensor, "ds_tensor") else tuple(tensor.shape)


def _kind(found: Any) -> str:
    if not isinstance(found, Tensor):
        return type(found).__name__
    return f"{_shape(found)} {str(found.dtype).removeprefix('torch.')}"
