"""How parameters lie on the ranks, and which ranks are a replica; here: whole ones, on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lordo_ds.checkpoint.header import Header
from lordo_ds.comm.connect import connect
from lordo_ds.comm.groups import groups_for, replica_groups
from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.nodes import layout_of_replicas
from lordo_ds.comm.slow_link import SlowLink
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import FlatTensor
from lordo_ds.core.grouping import ParameterFacts
from lordo_ds.core.steppable import refuse_unsteppable
from lordo_ds.replica.allocate import Held


class Ranks:
    """How parameters lie on the ranks, and which ranks are a replica: every `replica_size`, with whole parameters.

    Where parameters are sharded, a subclass says how: see `lordo_ds.adapters.fsdp2`.
    """

    on_mesh = False

    def at_rest(self, model: nn.Module) -> None:
        """Have the model hold the parameters that are stepped, where it holds others while it computes."""

    def look(self, parameters: Iterable[Tensor]) -> None:
        """At all of them, before each is asked for."""

    def check(self, name: str, parameter: Tensor) -> None:
        """Refuse a parameter that cannot be stepped where it lies. Nothing is communicated.

        Raises:
            ConfigError: naming it, what it is, and what to do.
        """
        refuse_unsteppable(name, parameter)

    def flat_of(self, parameter: Tensor, fact: ParameterFacts) -> FlatTensor:
        """Where a parameter lies on this rank and on the other shards. Nothing is communicated.

        Args:
            fact: of the whole parameter.
        """
        return FlatTensor.of_one(parameter, fact)

    def texts(self) -> dict[str, str]:
        """What else must be alike on all ranks."""
        return {}

    def connect(
        self, config: LordoConfig, device: torch.device, purpose: str = ""
    ) -> tuple[ReplicaWire, InsideReplica]:
        """Across replicas, and inside this one. Collective over all ranks where there are several.

        Args:
            purpose: names process groups of their own for it.
        """
        return replicas_of_torch(config, device, purpose)

    def header(self, header: Header) -> Header:
        """As it is saved."""
        return header

    def pack(self, state_dict: dict[str, Any], held: Held) -> dict[str, Any]:
        """An optimizer's state as it is saved. Nothing is communicated."""
        return state_dict

    def unpack(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inverse of `pack`.

        Raises:
            CheckpointError: it is none that `pack` made.
        """
        return state_dict


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def replicas_of_torch(
    config: LordoConfig, device: torch.device, purpose: str = ""
) -> tuple[ReplicaWire, InsideReplica]:
    """Every `replica_size` ranks of torch.distributed are a replica. Collective over all ranks where there are several.

    Returns:
        Across replicas; and the groups inside this one, whose ranks are alike. One replica alone asks nobody.
    """
    if several_ranks():
        groups = replica_groups(layout_of_replicas(range(dist.get_world_size()), config.replica_size, "replica_size"))
        if groups.layout.replica_count > 1:
            groups = groups_for(purpose, groups) if purpose else groups
            return connect(groups, device, SlowLink.of(config.wire_throttle), sharded=False, only_data_parallel=True)
    return ReplicaWire(), InsideReplica(device=device)
