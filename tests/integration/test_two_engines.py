"""Several engines in one process: DeepSpeed keeps one mpu for all of them, and each must reduce over its own ranks."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

from tests.engines import make_engine, settings
from tests.ranks import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).square().mean()


def config_of(kind: str, stage: int, replica_size: int | str = 1) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "enable_sanity_checks": True}
    config = settings(optimizer={"replica_size": replica_size, "rank": 2}, zero_optimization=zero)
    if kind == "AdamW":
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    if kind == "frozen":
        del config["optimizer"]
    return config


def engine_of(kind: str, stage: int, replica_size: int | str = 1) -> Any:
    net = Net()
    if kind == "frozen":
        net.requires_grad_(False)
    return make_engine(config_of(kind, stage, replica_size), net)


def batch(step: int) -> Tensor:
    """Another one on every rank."""
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def train(engine: Any, step: int) -> None:
    engine.backward(engine(batch(step)))
    engine.step()


def whole(engine: Any) -> Tensor:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return torch.cat([p.detach().reshape(-1).float() for p in engine.module.parameters()]).clone()


def of_ranks(weights: Tensor) -> Tensor:
    found = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(found, weights)
    return torch.stack(found)


def alone(kind: str, stage: int, replica_size: int | str = 1) -> Tensor:
    engine = engine_of(kind, stage, replica_size)
    for step in (1, 2):
        train(engine, step)
    found = whole(engine)
    engine.destroy()
    return found


def together(stage: int, folder: str) -> dict[str, list[bool]]:
    """Every order of an AdamW engine and LoRDO engines of two replica sizes, trained in turns: as if alone?"""
    expected = {one: alone(*one) for one in (("AdamW", stage), ("LoRDO", stage), ("LoRDO", stage, "all"))}
    adamw, small, large = expected
    found = {}
    for order in ((adamw, small), (small, adamw), (small, large), (large, adamw, small)):
        engines = [engine_of(*one) for one in order]
        for step in (1, 2):
            for engine in engines:
                train(engine, step)
            if step == 1:
                # A tag of its own: LoRDO refuses to replace one that an engine with AdamW has written into.
                engines[-1].save_checkpoint(folder, f"between{len(found)}")
        found[str(order)] = [
            bool(torch.equal(whole(engine), expected[one])) for engine, one in zip(engines, order, strict=True)
        ]
        for engine in engines:
            engine.destroy()
    ranks = of_ranks(expected[adamw])
    found["AdamW's ranks are equal"] = [bool((ranks == ranks[0]).all())]
    ranks = of_ranks(expected[small])
    found["replicas differ between syncs"] = [bool((ranks[0] != ranks[1]).any())]
    assert deepspeed_groups.mpu is None
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_engines_in_one_process_train_as_if_each_were_alone(stage: int, tmp_path: Any) -> None:
    """An AdamW engine stopped averaging its gradients at stage 0 once a LoRDO engine was built after it."""
    for found in run_ranks(together, 2, stage, str(tmp_path)):
        assert all(all(same) for same in found.values()), found


def with_a_teacher(stage: int, teachers_stage: int) -> tuple[bool, bool]:
    """A frozen engine beside, as in distillation: whether the student learns as with a plain module, and it stays."""
    losses = []
    for engine_beside in (False, True):
        student = engine_of("LoRDO", stage)
        teacher = engine_of("frozen", teachers_stage) if engine_beside else Net()
        before = whole(teacher) if engine_beside else None
        for step in (1, 2, 3, 4):
            with torch.no_grad():
                target = teacher(batch(-step))
            loss = (student(batch(step)) - target).square()
            losses.append(float(loss))
            student.backward(loss)
            student.step()
        same = before is None or torch.equal(before, whole(teacher))
        student.destroy()
    return losses[:4] == losses[4:], same


def all_teachers() -> dict[str, tuple[bool, bool]]:
    return {f"{student} {teacher}": with_a_teacher(student, teacher) for student in (0, 3) for teacher in (0, 3)}


def test_a_frozen_engine_beside_is_left_alone() -> None:
    for found in run_ranks(all_teachers, 2):
        assert all(learns and stays for learns, stays in found.values()), found


def made_and_destroyed() -> tuple[list[int], list[int]]:
    """Open descriptors and threads after each of ten engines; a clone of the TCP store is a connection."""
    dist.init_process_group("gloo", init_method="env://")
    descriptors, threads = [], []
    for _ in range(10):
        engine = engine_of("LoRDO", 1)
        train(engine, 1)
        engine.destroy()
        del engine
        gc.collect()
        dist.barrier()
        descriptors.append(len(os.listdir("/proc/self/fd")))
        threads.append(threading.active_count())
    return descriptors, threads


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_descriptors_and_threads_do_not_grow_with_engines_made_and_destroyed() -> None:
    """Three descriptors an engine on rank 0, one on the others: the watchdog's exit handler kept the store's clone."""
    for descriptors, threads in run_ranks(made_and_destroyed, 2, init_process_group=False):
        # Rank 0's last heartbeats may still wait for the others to read theirs: a connection has two ends there.
        assert max(descriptors[5:]) <= descriptors[0] + 6, descriptors
        assert max(threads[5:]) <= threads[0] + 2, threads
