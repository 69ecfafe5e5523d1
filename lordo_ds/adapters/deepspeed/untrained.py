"""Frozen parameters and buffers of a saved run of any layout: compared with this model's, then filled in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lordo_ds.adapters.deepspeed.saved_files import saved_buffers
from lordo_ds.comm.groups import ReplicaGroups
from lordo_ds.core.grouping import ParameterFacts, model_facts
from lordo_ds.core.slices import cut_slice
from lordo_ds.errors import CheckpointError


@dataclass(frozen=True)
class Untrained:
    """What no optimizer steps of this rank's part of the model: `frozen` parameters with their facts, and buffers."""

    frozen: dict[str, tuple[nn.Parameter, ParameterFacts]]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, engine: Any, groups: ReplicaGroups, trained: Collection[str]) -> Untrained:
        facts = model_facts(engine.module, groups.tensor_size)
        frozen = {fact.name: (parameter, fact) for parameter, fact in facts.items() if fact.name not in trained}
        return cls(frozen, saved_buffers(engine.module))

    @property
    def names(self) -> set[str]:
        return {*self.frozen, *self.buffers}


def check_untrained(
    here: Untrained, saved: Mapping[str, Tensor], known: Collection[str], folder: Path, strict: bool
) -> list[str]:
    """Refuse what does not fit, before anything is changed.

    Args:
        known: the names of all ranks together.
        strict: names must be the same; otherwise the differences are returned, in words. Shapes must be in any case.

    Raises:
        CheckpointError: with the name, and both shapes.
    """
    notes = []
    missing = sorted(here.names - saved.keys())
    if {name for name, (parameter, _) in here.frozen.items() if not parameter.requires_grad} == set(missing) != set():
        notes = [
            f"has no {name!r}, as all that is frozen: it was saved with exclude_frozen_parameters" for name in missing
        ]
        missing = []
    surplus = sorted(saved.keys() - known)
    words = [f"has no {name!r}, which this model has" for name in missing]
    words += [f"holds {name!r}, which this model has not" for name in surplus]
    if words and strict:
        raise CheckpointError(
            f"LoRDO: {folder} {words[0]}: give the model that it was saved with, or strict=False to load the rest"
        )
    for name in sorted(here.names & saved.keys()):
        found, wanted = _kinds(here, name, saved[name])
        if found != wanted:
            raise CheckpointError(
                f"LoRDO: {folder}: {name} is {found} in the checkpoint and {wanted} in this model: give the model that "
                "it was saved with"
            )
    return notes + words


def _kinds(here: Untrained, name: str, saved: Tensor) -> tuple[str, str]:
    """Shape, of the whole parameter, and kind of number; a precision may differ from the one saved."""
    if name in here.buffers:
        shape, dtype = tuple(here.buffers[name].shape), here.buffers[name].dtype
    else:
        parameter, fact = here.frozen[name]
        shape, dtype = fact.shape, parameter.dtype
        if fact.partitions > 1 and fact.partition_dim is not None:
            shape = tuple(n * (fact.partitions if d == fact.partition_dim else 1) for d, n in enumerate(shape))
    same_kind = saved.dtype == dtype or (saved.is_floating_point() and dtype.is_floating_point)
    found = f"{tuple(saved.shape)} {dtype if same_kind else saved.dtype}"
    return found.replace("torch.", ""), f"{shape} {dtype}".replace("torch.", "")


@torch.no_grad()
def fill_untrained(here: Untrained, saved: Mapping[str, Tensor], groups: ReplicaGroups) -> None:
    """Give the model what was saved; the rest stays as it is."""
    slice_index = dist.get_rank(groups.tensor)
    for name, (parameter, fact) in here.frozen.items():
        if name in saved:
            dim = fact.partition_dim if fact.partitions > 1 else None
            whole = cut_slice(saved[name], dim, fact.partition_stride, slice_index, fact.partitions)
            _fill_frozen(parameter, whole, groups)
    for name, buffer in here.buffers.items():
        if name in saved:
            buffer.copy_(saved[name])


def _fill_frozen(parameter: Any, whole: Tensor, groups: ReplicaGroups) -> None:
    """At stage 3 it is the partition that is kept; a gathered copy is stale until the next refresh."""
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        parameter.data.copy_(whole)
        return
    size, flat = partition.numel(), whole.reshape(-1)
    mine = flat[groups.shard_index * size : (groups.shard_index + 1) * size]
    partition.data.view(-1)[: mine.numel()].copy_(mine)
