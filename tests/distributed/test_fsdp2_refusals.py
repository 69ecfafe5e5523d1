"""What LoRDO refuses of `fully_shard`, DTensors and meshes, by name and on all ranks, before anything moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lordo_ds
from lordo_ds import ConfigError, LoRDO
from tests.cases import Found, once, run_cases
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

SETTINGS: dict[str, Any] = {"lr": 1e-2, "rank": 2, "sync_interval": 2}
Given = tuple[nn.Module, dict[str, Any]]


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8, dtype=dtype), nn.Linear(8, 5, dtype=dtype))


def mesh_of_replicas(shards: int = 2, tensor: int = 1) -> Any:
    return lordo_ds.replica_mesh("cpu", shards, tensor)


def sharded_over(mesh: Any, given: Any = None, **options: Any) -> Given:
    from torch.distributed.fsdp import fully_shard

    model = layers()
    fully_shard(model, mesh=mesh, **options)
    return model, {"mesh": given}


def on_the_full_mesh() -> Given:
    mesh = mesh_of_replicas()
    return sharded_over(mesh, mesh)


def over_all_ranks() -> Given:
    from torch.distributed.device_mesh import init_device_mesh

    return sharded_over(init_device_mesh("cpu", (4,)), mesh_of_replicas())


def along_columns() -> Given:
    from torch.distributed.tensor import Shard

    mesh = mesh_of_replicas()
    return sharded_over(mesh["shard"], mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1) if p.dim() > 1 else None)


def only_a_part() -> Given:
    model, mesh = layers(), mesh_of_replicas()
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0], mesh=mesh["shard"])
    return model, {"mesh": mesh}


def other_names() -> Given:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    return sharded_over(mesh["dp_shard"], mesh)


def not_over_all_ranks() -> Given:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "replica"))["replica"]
    return layers(), {"mesh": mesh}


def another_replica_size() -> Given:
    mesh = mesh_of_replicas()
    model, given = sharded_over(mesh["shard"], mesh)
    return model, {**given, "replica_size": 4}


def half_precision() -> Given:
    mesh = mesh_of_replicas()
    return lordo_ds.shard_model(layers(torch.bfloat16), mesh), {"mesh": mesh}


def no_mesh() -> Given:
    return sharded_over(mesh_of_replicas()["shard"])


def ddp() -> Given:
    return nn.parallel.DistributedDataParallel(layers()), {"mesh": mesh_of_replicas(shards=1)}


def uneven_slices() -> Given:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, mesh = layers(), mesh_of_replicas(shards=1, tensor=2)
    parallelize_module(model, mesh["tensor"], {"1": ColwiseParallel()})  # 5 rows
    return lordo_ds.shard_model(model, mesh), {"mesh": mesh}


def partial_gradient() -> Given:
    from torch.distributed.tensor import Partial

    mesh = mesh_of_replicas()
    model, given = sharded_over(mesh["shard"], mesh)
    for parameter in model.parameters():
        grad = torch.distributed.tensor.DTensor.from_local(
            torch.ones(parameter.shape), mesh["shard"], [Partial()], run_check=False
        )
        parameter.grad = grad
    return model, given


REFUSED: dict[str, tuple[Callable[[], Given], str]] = {
    "the full mesh": (on_the_full_mesh, "is on a mesh whose ranks [0, 2] belong to 2 replicas"),
    "all ranks": (over_all_ranks, "is on a mesh whose ranks [0, 1, 2, 3] belong to 2 replicas"),
    "columns": (along_columns, "0.weight is sharded along dimension 1: only the first one, 0, is supported"),
    "only a part": (only_a_part, "1.weight is not sharded over the 2 shards of a replica"),
    "other names": (other_names, "has the dimensions ['dp_replicate', 'dp_shard']: give a DeviceMesh with one called"),
    "fewer ranks": (not_over_all_ranks, "the mesh has 2 ranks, and there are 4"),
    "replica_size": (another_replica_size, "replica_size = 4, and the mesh has 2 shards in a replica: leave"),
    "bf16": (half_precision, "0.weight is torch.bfloat16: give fp32 or fp64 parameters (with a MixedPrecisionPolicy"),
    "no mesh": (no_mesh, "0.weight is a DTensor (fully_shard or parallelize_module), of which this rank holds a part"),
    "ddp": (ddp, "averages gradients over ranks [0, 1, 2, 3] at every step"),
    "uneven slices": (uneven_slices, "dimension 0 of 1.weight (5, 8) is sliced over 2 tensor-parallel ranks and no"),
    "partial gradient": (partial_gradient, "the gradient of 0.weight is (Partial(sum),), and the parameter (Shard("),
}


def refusal(name: str) -> tuple[str, bool]:
    """What is said, and whether the weights are as they were."""
    torch.manual_seed(dist.get_rank())  # other weights everywhere: making them equal would be seen
    try:
        model, given = REFUSED[name][0]()
        before = [local(p).clone() for p in model.parameters()]
        optimizer = LoRDO(model, **SETTINGS, **given)
        if name != "partial gradient":
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) + 1
        optimizer.step()
    except ConfigError as error:
        message = str(error)
    else:
        return "", False
    unmoved = all(torch.equal(a, local(p)) for a, p in zip(before, model.parameters(), strict=True))
    return message, unmoved or name == "partial gradient"  # only a gradient tells, after the start


def local(parameter: Any) -> torch.Tensor:
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach()


@once
def all_refusals() -> Found[str]:
    return run_cases(refusal, 4, {name: (name,) for name in REFUSED}, timeout_s=120)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name_on_all_ranks(name: str) -> None:
    for message, unmoved in all_refusals()[name]:
        assert REFUSED[name][1] in message and message.startswith("LoRDO: ") and "\n" not in message, message
        assert unmoved


def given_to_deepspeed() -> str:
    deepspeed = pytest.importorskip("deepspeed")
    mesh = mesh_of_replicas(shards=1)
    model = layers()
    optimizer = LoRDO(model, mesh=mesh, **SETTINGS)
    with pytest.raises(ConfigError) as caught:
        deepspeed.initialize(model=model, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 1})
    return str(caught.value)


@pytest.mark.deepspeed
def test_a_mesh_is_refused_under_deepspeed() -> None:
    for message in run_ranks(given_to_deepspeed, 2, timeout_s=60):
        assert "deepspeed.initialize was given LoRDO(..., mesh=...)" in message and "leave the mesh out" in message
