"""The ranks of a DeviceMesh: which are a replica, and where each parameter lies on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lordo_ds.adapters.fsdp2.layout import SHARD, TENSOR, dims_of_mesh, shard_intervals, sliced_facts
from lordo_ds.adapters.fsdp2.mesh import NAMES
from lordo_ds.adapters.fsdp2.saving import pack, unpack, whole_header
from lordo_ds.checkpoint.header import Header
from lordo_ds.comm.connect import connect
from lordo_ds.comm.groups import groups_for, of_all_ranks, replica_groups
from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.slow_link import SlowLink
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import FlatTensor, Piece
from lordo_ds.core.grouping import ParameterFacts
from lordo_ds.core.local import is_distributed, local_part
from lordo_ds.core.mesh import ReplicaLayout
from lordo_ds.core.steppable import refuse_unsteppable
from lordo_ds.errors import ConfigError
from lordo_ds.ranks import Ranks
from lordo_ds.replica.allocate import Held


def ranks_of(mesh: Any) -> Ranks:
    """What `LoRDO(..., mesh=mesh)` was given; nothing: whole parameters on every rank.

    Raises:
        ConfigError: a mesh without replicas, with other dimensions, or not over all ranks.
    """
    if mesh is None:
        return Ranks()
    if isinstance(mesh, dist.ProcessGroup):
        return MeshRanks({"replica": tuple(dist.get_process_group_ranks(mesh))})
    names = getattr(mesh, "mesh_dim_names", None) or ()
    if "replica" not in names or not set(names) <= set(NAMES):
        raise ConfigError(
            f"LoRDO: mesh = {mesh!r} has the dimensions {list(names)}: give a DeviceMesh with one called "
            '"replica" (of size 1 for a single replica), and "shard" and "tensor" where they are used '
            "(lordo_ds.replica_mesh makes one)"
        )
    if mesh.size() != dist.get_world_size() or mesh.get_coordinate() is None:
        raise ConfigError(
            f"LoRDO: the mesh has {mesh.size()} ranks, and there are {dist.get_world_size()}: give one over all of them"
        )
    return MeshRanks(dict(zip(names, _lines(mesh), strict=True)))


class MeshRanks(Ranks):
    """Replicas along one dimension of a mesh, and DTensors on the others.

    `lines` are the dist_ranks along each dimension of the mesh through this rank. Where only the replica group is
    known, the parameters' own mesh is that of the shards.
    """

    on_mesh = True

    def __init__(self, lines: dict[str, tuple[int, ...]]) -> None:
        self.lines = lines
        for name, ranks in lines.items():
            if list(ranks) != sorted(ranks):
                raise ConfigError(f"LoRDO: the ranks {list(ranks)} of the mesh's {name!r} must be in ascending order")

    # -- parameters ----------------------------------------------------------------------------------

    def at_rest(self, model: nn.Module) -> None:
        """Between a backward pass and the next, without `reshard_after_backward`, a module holds whole parameters."""
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def look(self, parameters: Iterable[Tensor]) -> None:
        """Take the shards from the parameters' own mesh where LoRDO was given the replica group only."""
        if SHARD not in self.lines:
            meshes = [parameter.device_mesh for parameter in parameters if is_distributed(parameter)]  # type: ignore[attr-defined]
            self.lines[SHARD] = _lines(meshes[0])[0] if meshes else (dist.get_rank(),)
        self.lines.setdefault(TENSOR, (dist.get_rank(),))

    def check(self, name: str, parameter: Tensor) -> None:
        refuse_unsteppable(name, local_part(parameter))

    def flat_of(self, parameter: Tensor, fact: ParameterFacts) -> FlatTensor:
        placements: dict[str, Any] = {}
        if is_distributed(parameter):
            roles = self._roles_of(parameter, fact.name)
            placements = dict(zip(roles, parameter.placements, strict=True))  # type: ignore[attr-defined]
        fact = sliced_facts(fact, placements, len(self.lines[TENSOR]))
        intervals = shard_intervals(fact, placements, len(self.lines[SHARD]))
        start, stop = intervals[self.lines[SHARD].index(dist.get_rank())]
        held = local_part(parameter).numel()
        if stop - start != held:
            raise ConfigError(
                f"LoRDO: {fact.name} has {held} elements on this rank, and {stop - start} were expected: torch shards "
                "it otherwise than version 2.13 does: install that one, or a newer lordo_ds"
            )
        return FlatTensor(parameter, (Piece(fact, intervals),))

    def _roles_of(self, parameter: Any, name: str = "") -> list[str]:
        """What each dimension of a DTensor's mesh does: see `dims_of_mesh`."""
        mesh = parameter.device_mesh
        dims = zip(mesh.mesh_dim_names or [""] * mesh.ndim, _lines(mesh), strict=True)
        return dims_of_mesh(name, list(dims), self.lines)

    # -- replicas ------------------------------------------------------------------------------------

    def texts(self) -> dict[str, str]:
        return {"the mesh": " x ".join(f"{len(self.lines[name])} {name}" for name in NAMES)}

    def connect(
        self, config: LordoConfig, device: torch.device, purpose: str = ""
    ) -> tuple[ReplicaWire, InsideReplica]:
        shards, slices = self.lines[SHARD], self.lines[TENSOR]
        if config.replica_size not in (1, len(shards)):
            raise ConfigError(
                f"LoRDO: replica_size = {config.replica_size!r}, and the mesh has {len(shards)} shards in a replica: "
                "leave replica_size out"
            )
        of_rank = of_all_ranks(shards)
        layout = ReplicaLayout(tuple(of_rank[rank] for rank in self.lines["replica"]))
        groups = replica_groups(layout, slices)
        groups = groups_for(purpose, groups) if purpose else groups
        return connect(
            groups, device, SlowLink.of(config.wire_throttle), sharded=True, only_data_parallel=len(slices) == 1
        )

    # -- saving --------------------------------------------------------------------------------------

    def header(self, header: Header) -> Header:
        return whole_header(header)

    def pack(self, state_dict: dict[str, Any], held: Held) -> dict[str, Any]:
        return pack(state_dict, held, self._roles_of)

    def unpack(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        return unpack(state_dict)


def _lines(mesh: Any) -> list[tuple[int, ...]]:
    """The dist_ranks along each dimension of a DeviceMesh, through this rank."""
    here = mesh.get_coordinate()
    if here is None:
        raise ConfigError(f"LoRDO: this rank, {dist.get_rank()}, is not on the mesh {mesh} of its parameters")
    places = [[*here[:dim], slice(None), *here[dim + 1 :]] for dim in range(mesh.ndim)]
    return [tuple(mesh.mesh[tuple(place)].tolist()) for place in places]
