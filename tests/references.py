"""Trajectories of `reference.py`, computed once for all ranks, layouts and cuts, and what fp32 rounding does to one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lordo_ds import LordoConfig
from lordo_ds.core.grouping import ParameterFacts, plan_parameters
from lordo_ds.core.reference import Reference
from tests import problems
from tests.cases import once

# Name -> (steps, replicas, *shape): the weights after every step.
Trajectory = dict[str, Tensor]
DRAWS = 8


def trajectory(
    settings: dict[str, Any],
    facts: Sequence[ParameterFacts],
    replicas: int,
    dtype: torch.dtype,
    steps: int = 10,
    shards: int = 1,
    draw: int | None = None,
) -> Trajectory:
    """The weights of the reference on `tests.problems`.

    Args:
        shards: data-parallel ranks of a replica, whose gradients it averages.
        draw: seeds another rounding of the gradients to `dtype`; without it they are rounded to nearest.
    """
    return _trajectory(json.dumps(settings), tuple(facts), replicas, dtype, steps, shards, draw)


@once
def _trajectory(
    settings: str,
    facts: tuple[ParameterFacts, ...],
    replicas: int,
    dtype: torch.dtype,
    steps: int,
    shards: int,
    draw: int | None,
) -> Trajectory:
    config = LordoConfig.parse(json.loads(settings))
    start = [problems.initial_weights(dtype) for _ in range(replicas)]
    reference = Reference(config, plan_parameters(config, list(facts)), start)
    found: dict[str, list[Tensor]] = {name: [] for name in problems.SHAPES}
    for step in range(1, steps + 1):
        each = [_gradients(step, rank, dtype, draw) for rank in range(replicas * shards)]
        of_replicas = [each[m : m + shards] for m in range(0, len(each), shards)]
        reference.step([{n: torch.stack([g[n] for g in gs]).mean(0) for n in gs[0]} for gs in of_replicas])
        for name, after in found.items():
            after.append(torch.stack([weights[name] for weights in reference.weights]))
    return {name: torch.stack(after) for name, after in found.items()}


def _gradients(step: int, rank: int, dtype: torch.dtype, draw: int | None) -> dict[str, Tensor]:
    if draw is None:
        return problems.gradients(step, rank, dtype)
    generator = torch.Generator().manual_seed(10_000 * draw + 100 * rank + step)
    rounded = {}
    for name, exact in problems.gradients(step, rank, torch.float64).items():
        bits = torch.rand(exact.shape, generator=generator, dtype=torch.float64) - 0.5
        rounded[name] = (exact * (1 + bits * torch.finfo(dtype).eps)).to(dtype)
    return rounded


def fp32_limit(
    distance: Callable[[Trajectory, Trajectory], float],
    settings: dict[str, Any],
    facts: Sequence[ParameterFacts],
    replicas: int,
    **options: Any,
) -> float:
    """How far apart two correct fp32 runs of a case may be: twice the largest error of DRAWS of them.

    Rounding comes up in the bases. D is the difference of weights |W| / |D| times its size, so it carries a relative
    error of u |W| / |D|, u = 2^-24 (here some 1e-5 already); what a basis takes from it is that over its relative gap,
    for D's k-th direction sigma_1 / (sigma_k - sigma_k+1), squared where the power iteration multiplies by D D^T. So
    `complement`, which leaves the leading directions out by design, stands worst. A step then turns an angle into
    lr |A| / eps times it. All of these depend on the case, so the error is measured: the reference runs in fp32, each
    time with the last bit of the gradients drawn anew, against the reference in fp64. An implementation that sums in
    another order is one more such run, and two runs are apart by at most the sum of their errors.
    """
    exact = trajectory(settings, facts, replicas, torch.float64, **options)
    runs = (trajectory(settings, facts, replicas, torch.float32, draw=draw, **options) for draw in range(1, DRAWS + 1))
    return 2 * max(distance(run, exact) for run in runs)
