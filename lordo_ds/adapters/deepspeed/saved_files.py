"""What the files of an engine hold beside the optimizer's tensors, told to the optimizer's header."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lordo_ds.adapters.deepspeed.pipeline import is_pipeline
from lordo_ds.checkpoint.header import EngineFacts, Untrained
from lordo_ds.comm.groups import ReplicaGroups
from lordo_ds.core.grouping import ParameterFacts
from lordo_ds.optimizer import LoRDO


def tell_header(
    engine: Any,
    groups: ReplicaGroups,
    facts: Mapping[nn.Parameter, ParameterFacts],
    trained: Collection[nn.Parameter],
) -> None:
    """Let the saved state say where the weights are, and what is frozen."""
    optimizer: LoRDO = engine.basic_optimizer
    optimizer.pipe_stages = groups.pipe_size
    optimizer.pipe_stage = int(engine.grid.get_stage_id()) if is_pipeline(engine) else 0
    frozen = [
        Untrained(
            name=fact.name,
            shape=fact.shape,
            partition_dim=fact.partition_dim,
            partitions=fact.partitions,
            partition_stride=fact.partition_stride,
        )
        for parameter, fact in facts.items()
        if parameter not in trained
    ]
    buffers = [Untrained(name=name, shape=tuple(tensor.shape)) for name, tensor in saved_buffers(engine.module).items()]
    places = _layer_places(engine.module, facts) if is_pipeline(engine) else {}
    if engine.optimizer is not optimizer:  # full-precision masters are in the optimizer's own files
        kept = {one.name for one in (*frozen, *buffers)}
        places = {name: place for name, place in places.items() if name in kept}
    optimizer.engine_facts = EngineFacts(
        zero_stage=int(engine.zero_optimization_stage()),
        wrapper=type(engine.optimizer).__name__,
        precision="bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32",
        places=places,
        untrained=tuple([*frozen, *buffers]),
    )


def saved_buffers(module: nn.Module) -> dict[str, Any]:
    """Persistent buffers by the name that they have in the model in one piece."""
    rename = getattr(module, "name_in_one_piece", str)
    found = {}
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                whole_name = f"{prefix}.{name}" if prefix else name
                found[rename(whole_name)] = buffer
    return found


def _layer_places(module: Any, facts: Mapping[nn.Parameter, ParameterFacts]) -> dict[str, tuple[str, str]]:
    """The file of a pipeline's layer, and the key in it, of every parameter and buffer of this stage."""
    buffers = {buffer: name for name, buffer in saved_buffers(module).items()}
    places: dict[str, tuple[str, str]] = {}
    for index, layer in enumerate(module.forward_funcs):
        if not hasattr(layer, "state_dict"):
            continue
        file = os.path.basename(module.ckpt_layer_path("", index))
        named = [(facts[p].name, key) for key, p in layer.named_parameters()]
        named += [(buffers[b], key) for key, b in layer.named_buffers() if b in buffers]
        for name, key in named:
            places.setdefault(name, (file, key))
    return places
