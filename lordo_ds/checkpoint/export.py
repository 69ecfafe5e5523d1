"""Plain weights out of a saved run: one safetensors file, or the files of a Hugging Face model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lordo_ds.checkpoint.folders import whole_folder
from lordo_ds.checkpoint.hf_gpt import HuggingFaceGpt
from lordo_ds.checkpoint.reshaped_run import ReshapedRun
from lordo_ds.checkpoint.run import SavedRun
from lordo_ds.checkpoint.tensor_file import TensorWriter
from lordo_ds.disk import write_text
from lordo_ds.errors import CheckpointError

EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = "model.safetensors"


def one_model(run: SavedRun, replica: int | None) -> SavedRun:
    """The run as one replica: that of the number, or the mean of all.

    Raises:
        CheckpointError: there is no such replica.
    """
    if replica is None:
        return ReshapedRun(run, 1)
    if not 0 <= replica < run.replicas:
        raise CheckpointError(
            f"LoRDO: --replica {replica}: {run.path} holds replicas 0 to {run.replicas - 1} (or give 'average')"
        )
    return run


def plain_weights(run: SavedRun, replica: int | None) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by its name in the model in one piece, one at a time."""
    model, index = one_model(run, replica), replica or 0
    for name in model.parameters:
        yield name, model.state(name, index)["weight"]
    yield from model.untrained(index).items()


def export_safetensors(run: SavedRun, folder: str | Path, dtype: str = "fp32", replica: int | None = None) -> None:
    """Write `model.safetensors` into a directory; whole or not at all.

    Args:
        replica: its number; None: the mean of all, which at a sync is everybody's.
    """
    one_model(run, replica)
    with whole_folder(Path(folder)) as part:
        names = [*run.parameters, *run.untrained(0)]
        with TensorWriter(part / WEIGHTS, names, _about(run, replica)) as writer:
            for name, weight in plain_weights(run, replica):
                writer.add(name, _cast(weight, dtype))


def export_hf(
    run: SavedRun,
    folder: str | Path,
    dtype: str = "fp32",
    replica: int | None = None,
    model: Mapping[str, Any] | None = None,
) -> None:
    """Write the reference GPT as a Llama or Qwen3 that transformers loads: config.json and model.safetensors.

    Args:
        model: the keys of its model file; default: what the training script saved with the checkpoint.

    Raises:
        CheckpointError: transformers has no such model, or the weights are not those of one.
    """
    saved = run.engine_state(0).client_state.get("model")
    one_model(run, replica)
    keys = model if model is not None else saved
    if not isinstance(keys, Mapping):
        raise CheckpointError(f"LoRDO: {run.path} does not say what model it is: give --model configs/model/NAME.yaml")
    gpt = HuggingFaceGpt.of(keys, run.parameters)
    with whole_folder(Path(folder)) as part:
        with TensorWriter(part / WEIGHTS, gpt.names, {"format": "pt", **_about(run, replica)}) as writer:
            for name, weight in plain_weights(run, replica):
                for new_name, tensor in gpt.convert(name, weight):
                    writer.add(new_name, _cast(tensor, dtype))
        write_text(part / "config.json", json.dumps(gpt.config(EXPORT_DTYPES[dtype]), indent=2) + "\n")


def _about(run: SavedRun, replica: int | None) -> dict[str, str]:
    step = run.counters(replica or 0).attempted_steps
    return {
        "source": f"{run.path.name}, {'mean of replicas' if replica is None else f'replica {replica}'}, step {step}"
    }


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    return tensor.to(EXPORT_DTYPES[dtype]) if tensor.is_floating_point() else tensor
