"""A mesh of replicas, and models sharded on it as LoRDO needs them: inside a replica, and not across.

mesh = replica_mesh("cuda", shards=8)                # ("replica", "shard") over all ranks
model = shard_model(model, mesh, model.blocks)       # fully_shard of every block, and of the model
optimizer = LoRDO(model, mesh=mesh, rank=128, sync_interval=32)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from lordo_ds.comm.groups import make_groups
from lordo_ds.errors import ConfigError

NAMES = ("replica", "shard", "tensor")
_Model = TypeVar("_Model", bound=nn.Module)


def replica_mesh(device_type: str, shards: int = 1, tensor: int = 1) -> Any:
    """A DeviceMesh over all ranks, as many replicas as there is room for; tensor-parallel ranks are neighbours.

    Collective over all ranks.

    Args:
        device_type: "cuda" or "cpu".
        shards: ranks that `fully_shard` cuts every parameter of a replica over.
        tensor: ranks that `parallelize_module` slices its layers over; with 1 the mesh has no such dimension.

    Returns:
        With the dimensions "replica", "shard" and, if it is used, "tensor".

    Raises:
        ConfigError: the number of ranks is no multiple of the two.
    """
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size()
    if shards < 1 or tensor < 1 or world % (shards * tensor):
        raise ConfigError(
            f"LoRDO: replicas of {shards} shards x {tensor} tensor-parallel ranks do not divide {world} ranks: give "
            "numbers whose product does"
        )
    sizes = (world // (shards * tensor), shards, tensor)
    dims = 3 if tensor > 1 else 2
    return init_device_mesh(device_type, sizes[:dims], mesh_dim_names=NAMES[:dims])


def replica_group(mesh: Any) -> dist.ProcessGroup:
    """The process group of all ranks of this rank's replica, for what each replica does alone, such as saving.

    Collective over all ranks, at the first call for a mesh.
    """
    here = mesh.get_coordinate()
    if here is None or "replica" not in (mesh.mesh_dim_names or ()):
        raise ConfigError(f"LoRDO: the mesh {mesh} has no replicas, or not this rank: make it with replica_mesh")
    dim = mesh.mesh_dim_names.index("replica")
    ranks = mesh.mesh.select(dim, here[dim]).flatten().tolist()
    return make_groups([sorted(ranks)])[0]


def shard_model(model: _Model, mesh: Any, blocks: Iterable[nn.Module] = (), **options: Any) -> _Model:
    """`fully_shard` of each block and then of the model, over the ranks of one replica only.

    With tensor parallelism call `parallelize_module(model, mesh["tensor"], plan)` before. Gradients are then averaged
    over the shards of a replica, and nothing crosses replicas but what LoRDO sends.

    Args:
        mesh: with a dimension "shard"; see `replica_mesh`.
        blocks: modules that are gathered one at a time, transformer blocks as a rule.
        options: of `fully_shard`, such as `mp_policy` and `reshard_after_forward`.

    Returns:
        The model.
    """
    from torch.distributed.fsdp import fully_shard

    if "shard" not in (mesh.mesh_dim_names or ()):
        raise ConfigError(f'LoRDO: the mesh {mesh} has no dimension "shard": make it with lordo_ds.replica_mesh')
    modules: list[nn.Module] = [*blocks, model]
    for module in modules:
        fully_shard(module, mesh=mesh["shard"], **options)
    return model
