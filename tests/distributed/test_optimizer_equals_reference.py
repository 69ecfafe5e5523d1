"""The optimizer on 1, 2 and 4 ranks follows `reference.py`, in every mode, on matrices of every proportion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lordo_ds import LoRDO, LordoConfig
from lordo_ds.core.grouping import plan_parameters
from lordo_ds.core.reference import Reference
from tests import problems
from tests.ranks import run_ranks

STEPS = 10
BASE = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "rank": 3, "sync_interval": 3}
OUTER = {"lr": 0.7, "momentum": 0.7}
SPECTRAL = {"lr": 1.0, "momentum": 0.7, "orthogonalize": True, "residual_gain": 2.0}
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "recommended": {"preset": "recommended"},
    "error_feedback": {"error_feedback": "fp32", "qh_mode": "none"},
    "error_feedback_full_rank": {"error_feedback": "fp32", "outer": OUTER},
    "error_feedback_factored": {"error_feedback": "fp32", "qh_mode": "factored", "basis_update": "eigh"},
    "low_rank_term": {"qh_mode": "low_rank", "error_feedback": "fp32", "omega": 0.8},
    "no_term": {"qh_mode": "none"},
    "eigh": {"basis_update": "eigh"},
    "svd_outer_without_nesterov": {"basis_update": "svd", "outer": {"lr": 0.5, "momentum": 0.6, "nesterov": False}},
    "complement": {"basis_source": "complement", "error_feedback": "fp32", "rank": 2},
    "gradient": {"basis_source": "gradient", "error_feedback": "fp32", "qh_mode": "none"},
    "gradient_every_step": {
        "basis_source": "gradient",
        "sync_interval": 1,
        "qh_mode": "none",
        "error_feedback": "fp32",
    },
    "orthogonalized": {"qh_mode": "factored", "residual_weight": 0.3, "outer": {**OUTER, "orthogonalize": True}},
    "residual_gain": {"outer": {"lr": 0.9, "residual_gain": 2.5}},
    "spectral": {"qh_mode": "factored", "omega": 0.9, "residual_weight": 0.25, "outer": SPECTRAL},
    "spectral_warm_up": {"sync_warmup_steps": 4, "outer": {**SPECTRAL, "nesterov": False}},
    "gradient_outer": {"basis_source": "gradient", "outer": OUTER},
    "local": {"projection": "local", "qh_mode": "factored"},
    "local_gradient": {"projection": "local", "basis_source": "gradient", "error_feedback": "fp32"},
    "rank_above_the_smaller_side": {"rank": 64, "basis_update": "svd"},
    "rank_as_a_fraction": {"rank": "1/2"},
    "moments_averaged_less_often": {"moment_sync_interval": [3, 6]},
    "moments_never_averaged": {"moment_sync_interval": "never"},
    "dense_moments_averaged": {"average_dense_moments": True},
    "warm_up": {"sync_warmup_steps": 4, "outer": OUTER},
    "all_dense": {"low_rank": {"exclude": [".*"]}, "outer": OUTER},
    "every_step": {"sync_interval": 1},
    "small_buckets": {"_bucket_numel": 50},
}


def largest_difference(case: dict[str, Any], dtype: torch.dtype, skips: dict[int, list[int]] | None = None) -> float:
    """Largest distance to this replica's weights in the reference, relative to each parameter's largest weight."""
    settings = {**BASE, **{key: value for key, value in case.items() if not key.startswith("_")}}
    replica, replicas = dist.get_rank(), dist.get_world_size()
    named = [(name, torch.nn.Parameter(w)) for name, w in problems.initial_weights(dtype).items()]
    optimizer = LoRDO(named, **settings)
    if "_bucket_numel" in case:
        _rebucket(optimizer, case["_bucket_numel"])
    config = LordoConfig.parse(settings)
    plans = plan_parameters(config, problems.facts())
    reference = Reference(config, plans, [problems.initial_weights(dtype) for _ in range(replicas)])
    worst = 0.0
    for step in range(1, STEPS + 1):
        all_gradients = [problems.gradients(step, m, dtype) for m in range(replicas)]
        for name, parameter in named:
            parameter.grad = all_gradients[replica][name].clone()
        optimizer.step()
        reference.step(all_gradients)
        for name, parameter in named:
            expected = reference.weights[replica][name]
            worst = max(worst, float((parameter.detach() - expected).abs().max() / expected.abs().max()))
    if replicas > 1 and settings.get("sync_interval", 3) > 1:
        assert optimizer.last_report is not None and optimizer.last_report.drift > 0
    return worst


def _rebucket(optimizer: LoRDO, bucket_numel: int) -> None:
    from lordo_ds.dist.sync import OuterSync

    optimizer._attach_alone()
    old = optimizer.sync
    assert old is not None
    optimizer.sync = OuterSync(optimizer.config, old.items, old.wire, old.inside, bucket_numel=bucket_numel)
    assert len(optimizer.sync.buckets) > 2


def all_differences() -> dict[tuple[str, str], float]:
    torch.set_num_threads(1)
    return {
        (name, str(dtype)): largest_difference(case, dtype)
        for name, case in CASES.items()
        for dtype in (torch.float64, torch.float32)
    }


@pytest.mark.distributed
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_every_mode_follows_the_reference(replicas: int) -> None:
    for differences in run_ranks(all_differences, replicas, timeout_s=240):
        for (name, dtype), difference in differences.items():
            tolerance = 1e-6 if dtype == "torch.float64" else 1e-5
            assert difference < tolerance, f"{name} in {dtype}: {difference:.1e}"
