"""`torch.amp.GradScaler` around an optimizer without an engine: an overflow on one replica is an attempt on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lordo_ds import LoRDO, LordoConfig
from lordo_ds.core.grouping import plan_parameters
from lordo_ds.core.reference import Reference
from tests import problems
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 8
SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "rank": 3, "sync_interval": 3, "outer": {"momentum": 0.7}}
CLIP = 1.5


def clipped(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient.values()]))
    factor = (CLIP / (norm + 1e-6)).clamp(max=1.0)
    return {name: g * factor for name, g in gradient.items()}


def scaled_steps(overflows: dict[int, list[int]], clips: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Train as torch's examples do; `overflows` are the steps that each replica overflows at."""
    rank, replicas = dist.get_rank(), dist.get_world_size()
    named = [(name, torch.nn.Parameter(w)) for name, w in problems.initial_weights(dtype).items()]
    optimizer = LoRDO(named, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    config = LordoConfig.parse(SETTINGS)
    plans = plan_parameters(config, problems.facts())
    reference = Reference(config, plans, [problems.initial_weights(dtype) for _ in range(replicas)])
    worst, attempts, scales = 0.0, [], []
    for step in range(1, STEPS + 1):
        own = problems.gradients(step, rank, dtype)
        loss = sum((p * own[name]).sum() for name, p in named)
        if step in overflows[rank]:
            loss = loss + (named[0][1] * float("inf")).sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if clips:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_([p for _, p in named], CLIP)
        scaler.step(optimizer)
        scaler.update()
        given = [problems.gradients(step, m, dtype) for m in range(replicas)]
        reference.step([
            None if step in overflows[m] else clipped(g) if clips else g for m, g in enumerate(given)
        ])  # fmt: skip
        worst = max(
            worst,
            *(float((p.detach() - (w := reference.weights[rank][n])).abs().max() / w.abs().max()) for n, p in named),
        )
        attempts.append((optimizer.attempted_steps, optimizer.synced))
        scales.append(scaler.get_scale())
    left = [name for name in ("grad_scale", "found_inf") if hasattr(optimizer, name)]
    return {"worst": worst, "attempts": attempts, "scales": scales, "left": left}


def all_scaled() -> list[dict[str, Any]]:
    return [
        scaled_steps({0: [], 1: at}, clips, dtype)
        for at in ([], [1, 4, 6], [2, 3])
        for clips in (False, True)
        for dtype in (torch.float32, torch.float64)
    ]


def test_an_overflow_on_one_replica_follows_the_reference_and_counts_as_an_attempt() -> None:
    first, second = run_ranks(all_scaled, 2, timeout_s=60)
    for cases in (first, second):
        for case in cases:
            assert case["worst"] < 1e-5
            assert case["attempts"] == [(step, step % 3 == 0) for step in range(1, STEPS + 1)]
            assert not case["left"]
    assert all(case["scales"][-1] == 4096.0 for case in first)
    assert [case["scales"][-1] for case in second[::4]] == [4096.0, 128.0, 512.0], "each replica has its own scale"


def left_out() -> list[tuple[int, bool]]:
    """A loop that leaves a batch out on one replica says so."""
    named = [(name, torch.nn.Parameter(w)) for name, w in problems.initial_weights(torch.float32).items()]
    optimizer, seen = LoRDO(named, **SETTINGS), []
    for step in range(1, 4):
        if step == 2 - dist.get_rank():
            optimizer.skip_step()
        else:
            for name, parameter in named:
                parameter.grad = problems.gradients(step, dist.get_rank(), torch.float32)[name]
            optimizer.step()
        seen.append((optimizer.executed_steps, optimizer.synced))
    return seen


def test_a_loop_may_leave_a_step_out_and_say_so() -> None:
    first, second = run_ranks(left_out, 2, timeout_s=60)
    assert first == [(1, False), (1, False), (2, True)] and second == [(0, False), (1, False), (2, True)]


def first_of_a_warm_up_left_out() -> tuple[int, int, bool]:
    """At a learning rate of 0 torch's made-up steps look much like the first one: the replicas tell each other."""
    named = [
        (name, torch.nn.Parameter(w + dist.get_rank())) for name, w in problems.initial_weights(torch.float32).items()
    ]
    optimizer = LoRDO(named, **{**SETTINGS, "lr": 0.0})
    for step in range(1, 4):
        if step == 1 and dist.get_rank() == 0:
            optimizer.skip_step()
        else:
            for name, parameter in named:
                parameter.grad = problems.gradients(step, dist.get_rank(), torch.float32)[name]
            optimizer.step()
    return optimizer.attempted_steps, optimizer.executed_steps, optimizer.synced


def test_the_first_step_of_a_warm_up_may_be_left_out_too() -> None:
    assert run_ranks(first_of_a_warm_up_left_out, 2, timeout_s=30) == [(3, 3, True), (3, 3, True)]
