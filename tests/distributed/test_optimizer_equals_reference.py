"""The optimizer on 1, 2 and 4 ranks follows `reference.py`, in every mode, on matrices of every proportion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lordo_ds import LoRDO
from tests import problems
from tests.cases import Found, once, run_cases
from tests.references import Trajectory, fp32_limit, trajectory

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
    "owners": {"outer": {"compute": "owner"}},
    "owners_spectral": {"qh_mode": "factored", "omega": 0.9, "outer": {**SPECTRAL, "compute": "owner"}},
    "owners_eigh": {"basis_update": "eigh", "error_feedback": "fp32", "outer": {**OUTER, "compute": "owner"}},
    "owners_complement": {
        "basis_source": "complement",
        "error_feedback": "fp32",
        "rank": 2,
        "outer": {"compute": "owner"},
    },
    "owners_moments_less_often": {"moment_sync_interval": [3, 6], "outer": {**OUTER, "compute": "owner"}},
    "owners_squares_oftener": {"moment_sync_interval": [6, 3], "outer": {**OUTER, "compute": "owner"}},
    "owners_moments_never": {"moment_sync_interval": "never", "outer": {**OUTER, "compute": "owner"}},
    "owners_dense_moments": {"average_dense_moments": True, "outer": {**OUTER, "compute": "owner"}},
    "owners_warm_up": {"sync_warmup_steps": 4, "qh_mode": "factored", "outer": {**SPECTRAL, "compute": "owner"}},
    "owners_all_dense": {"low_rank": {"exclude": [".*"]}, "outer": {**OUTER, "compute": "owner"}},
    "owners_small_buckets": {"_bucket_numel": 50, "outer": {**SPECTRAL, "compute": "owner"}},
    "owners_int8_wire": {"pseudo_gradient_dtype": "int8", "outer": {**SPECTRAL, "compute": "owner"}},
    "owners_sparse_wire": {
        "pseudo_gradient_dtype": {"top_k": 8, "block": 64},
        "sync_warmup_steps": 2,
        "outer": {**OUTER, "compute": "owner"},
    },
    "everyone_spectral": {"qh_mode": "factored", "outer": {**SPECTRAL, "compute": "everyone"}},
    "bf16_wire": {"pseudo_gradient_dtype": "bf16", "outer": OUTER},
    "int8_wire": {"pseudo_gradient_dtype": "int8"},
    "int8_wire_spectral": {"pseudo_gradient_dtype": "int8", "preset": "recommended", "sync_warmup_steps": 2},
    "int4_wire": {"pseudo_gradient_dtype": "int4", "outer": OUTER, "average_dense_moments": True},
    "sparse_wire": {"pseudo_gradient_dtype": {"top_k": 8, "block": 64}, "qh_mode": "factored"},
    "sparse_wire_local": {"pseudo_gradient_dtype": {"top_k": 8, "block": 64}, "projection": "local"},
}


def settings_of(name: str) -> dict[str, Any]:
    return {**BASE, **{key: value for key, value in CASES[name].items() if not key.startswith("_")}}


def largest_difference(expected: Trajectory, name: str, dtype: torch.dtype) -> float:
    """Largest distance to this replica's weights in the reference, relative to each parameter's largest weight."""
    settings, case = settings_of(name), CASES[name]
    replica, replicas = dist.get_rank(), dist.get_world_size()
    named = [(name, torch.nn.Parameter(w)) for name, w in problems.initial_weights(dtype).items()]
    optimizer = LoRDO(named, **settings)
    if "_bucket_numel" in case:
        _rebucket(optimizer, case["_bucket_numel"])
    worst = 0.0
    for step in range(1, STEPS + 1):
        gradients = problems.gradients(step, replica, dtype)
        for name, parameter in named:
            parameter.grad = gradients[name]
        optimizer.step()
        for name, parameter in named:
            theirs = expected[name][step - 1, replica]
            worst = max(worst, float((parameter.detach() - theirs).abs().max() / theirs.abs().max()))
    if replicas > 1 and settings.get("sync_interval", 3) > 1:
        assert optimizer.last_report is not None and optimizer.last_report.drift > 0
    return worst


def _rebucket(optimizer: LoRDO, bucket_numel: int) -> None:
    from lordo_ds.sync.outer_sync import OuterSync

    optimizer._attach_alone()
    old = optimizer.sync
    assert old is not None and optimizer._steps is not None
    optimizer.sync = OuterSync(optimizer.config, old.items, old.wire, old.inside, bucket_numel=bucket_numel)
    optimizer.sync.share_out()
    optimizer._steps.bases = optimizer.sync.bases
    assert len(optimizer.sync.buckets) > 2


def dtypes_on(replicas: int, case: str) -> tuple[torch.dtype, ...]:
    """More replicas add nothing to what fp32 rounds differently; a wire turns its last bit into a whole step."""
    return (torch.float64, torch.float32) if replicas <= 2 and "wire" not in case else (torch.float64,)


@once
def all_differences(replicas: int) -> Found[tuple[str, torch.dtype]]:
    cases = {
        (name, dtype): (trajectory(settings_of(name), problems.facts(), replicas, dtype, STEPS), name, dtype)
        for name in CASES
        for dtype in dtypes_on(replicas, name)
    }
    return run_cases(largest_difference, replicas, cases, timeout_s=280)


def farthest(run: Trajectory, exact: Trajectory) -> float:
    """As `largest_difference` measures it."""
    return max(
        float(((run[name] - one).abs().flatten(2).amax(2) / one.abs().flatten(2).amax(2)).max())
        for name, one in exact.items()
    )


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_every_mode_follows_the_reference(replicas: int, case: str) -> None:
    found = all_differences(replicas)
    assert max(found[case, torch.float64]) < 1e-6
    if torch.float32 not in dtypes_on(replicas, case):
        return
    limit, worst = 1e-5, max(found[case, torch.float32])
    if worst > limit:
        limit = fp32_limit(farthest, settings_of(case), problems.facts(), replicas, steps=STEPS)
    assert worst < limit, f"{worst:.1e}, not below {limit:.1e}"
