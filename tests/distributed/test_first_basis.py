"""A matrix gets its basis from the first gradient that has a direction, whoever holds it, and as `reference.py` says.

LoRA's A, and what comes before a zero-initialised projection, has none in the first steps; an unused matrix never.
"""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lordo_ds import LoRDO, LordoConfig
from lordo_ds.core.grouping import plan_parameters
from lordo_ds.core.reference import Reference
from lordo_ds.core.schedule import sync_plan
from tests import problems
from tests.distributed.test_shards_equal_reference import SLICED, difference, facts
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 16
BASE: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "rank": 3, "sync_interval": 5}
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "recommended": {"preset": "recommended"},
    "error_feedback": {"error_feedback": "fp32", "qh_mode": "none"},
    "complement": {"basis_source": "complement", "error_feedback": "fp32", "rank": 2},
    "gradient": {"basis_source": "gradient", "error_feedback": "fp32", "qh_mode": "none"},
    "local": {"projection": "local", "qh_mode": "factored"},
    "local_gradient": {"projection": "local", "basis_source": "gradient"},
    "warm_up": {"sync_warmup_steps": 4, "outer": {"lr": 0.7, "momentum": 0.7}},
}
# (step, replica) that an fp16 overflow skips, and where gradients are not finite.
SKIPPED, BROKEN = {(1, 0), (3, 1), (6, 0)}, {(2, 1)}


def late_gradients(step: int, replica: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Those of tests/problems.py, but "small" has never one, and others not at first."""
    found = problems.gradients(step, replica, dtype)
    has_one = {
        "tall": step > 1,
        "long": step > 4 or replica == 1,  # the average has a direction at once
        "wide": step > 8,  # asked for at step 10, where a sync is due
        "square": step > 2,
        "small": False,
    }
    return {name: gradient * has_one.get(name, True) for name, gradient in found.items()}


def attached(settings: dict[str, Any]) -> tuple[dict[str, torch.nn.Parameter], LoRDO]:
    named = {name: torch.nn.Parameter(w) for name, w in problems.initial_weights(torch.float64).items()}
    optimizer = LoRDO(named.items(), **settings)
    optimizer._attach_alone()
    optimizer.managed = True  # the engine's way: step() where a step is executed, end_attempt() always
    return named, optimizer


def against_the_reference(case: dict[str, Any], faults: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    settings = {**BASE, **case}
    replica, replicas = dist.get_rank(), dist.get_world_size()
    named, optimizer = attached(settings)
    config = LordoConfig.parse(settings)
    start = [problems.initial_weights(torch.float64) for _ in range(replicas)]
    reference = Reference(config, plan_parameters(config, problems.facts()), start)
    wrong, crossed = "", []
    for step in range(1, STEPS + 1):
        gradients: list[Any] = [late_gradients(step, m, torch.float64) for m in range(replicas)]
        for m in range(replicas) if faults else ():
            if (step, m) in SKIPPED:
                gradients[m] = None
            elif (step, m) in BROKEN:
                gradients[m]["tall"] = gradients[m]["tall"] * float("nan")
        if gradients[replica] is not None:
            for name, parameter in named.items():
                parameter.grad = gradients[replica][name].clone()
            optimizer.step()
        before = optimizer.sync.wire.ledger.total_bytes
        optimizer.end_attempt()
        if optimizer.sync.wire.ledger.total_bytes > before and not sync_plan(config, step).due:
            crossed.append(step)
        if step == 11:  # another process goes on
            saved = {name: p.detach().clone() for name, p in named.items()}, copy.deepcopy(optimizer.state_dict())
            named, optimizer = attached(settings)
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(saved[0][name])
            optimizer.load_state_dict(saved[1])
        reference.step(gradients)
        for name, parameter in named.items():
            state, theirs = optimizer.state[parameter][name], reference.state[replica][name]
            apart = (parameter.detach() - reference.weights[replica][name]).abs().max()
            same_basis = state.get("has_basis") == (theirs["Q"] is not None) or "basis" not in state
            if not (apart < 1e-6 or case_is_broken(reference)) or state["step"] != theirs["t"] or not same_basis:
                wrong = wrong or f"{name} at step {step} on replica {replica}: {apart:.1e}, t {state['step']}"
    waiting = [name for name, p in named.items() if optimizer.state[p][name].get("has_basis") is False]
    return {"wrong": wrong, "waiting": waiting, "crossed": crossed, "notes": optimizer.last_report.basis_notes}


def case_is_broken(reference: Reference) -> bool:
    return not all(bool(torch.isfinite(w).all()) for weights in reference.weights for w in weights.values())


def all_cases() -> dict[tuple[str, bool], dict[str, Any]]:
    logging.getLogger("lordo_ds").setLevel(logging.CRITICAL)
    faults = [False, True] if dist.get_world_size() > 1 else [False]
    return {(n, f): against_the_reference(c, f) for (n, c), f in itertools.product(CASES.items(), faults)}


@pytest.mark.parametrize("replicas", [1, 2])
def test_late_first_gradients_follow_the_reference_also_through_a_resume(replicas: int) -> None:
    for found in run_ranks(all_cases, replicas, timeout_s=120):
        for (name, faults), one in found.items():
            assert not one["wrong"], f"{name}: {one['wrong']}"
            assert one["waiting"] == ["small"] and "no gradient" in one["notes"]["small"], name
            if name == "paper" and replicas == 2 and not faults:
                # "small" never has a gradient, and still nothing crosses but in the first steps and at 2^k; step 12 is
                # the first of the process that resumed, which learns that the others have stepped too.
                assert one["crossed"] == [1, 2, 3, 4, 6, 7, 8, 12, 16]


def shards_and_slices(replica_size: int, tensor: int) -> dict[str, float]:
    torch.set_num_threads(1)
    replicas, found = dist.get_world_size() // (replica_size * tensor), {}
    for name, kind in (("recommended", "equal"), ("gradient", "inside_one_row"), ("local", "equal")):
        settings = {**BASE, **CASES[name]}
        plans = plan_parameters(LordoConfig.parse(settings), facts(SLICED, 1))
        start = [problems.initial_weights(torch.float64) for _ in range(replicas)]
        reference = Reference(LordoConfig.parse(settings), plans, start)
        after: dict[str, list[Tensor]] = {plan.name: [] for plan in plans}
        for step in range(1, STEPS + 1):
            reference.step([gradients_on_some_rows(step, m, torch.float64) for m in range(replicas)])
            for one, weights in after.items():
                weights.append(torch.stack([replica[one] for replica in reference.weights]))
        expected = {one: torch.stack(weights) for one, weights in after.items()}
        found[f"{name} {kind}"] = difference(
            expected, settings, kind, replica_size, tensor, SLICED, torch.float64, gradients_on_some_rows
        )[0]
    return found


def gradients_on_some_rows(step: int, replica: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """At first some shards, or slices, see only zeros where others do not."""
    found = late_gradients(step, replica, dtype)
    for gradient in found.values():
        if step < 4 and gradient.dim() == 2:
            gradient[: len(gradient) // 2] = 0
            gradient[:, 2:] *= replica
    return found


@pytest.mark.parametrize(("replicas", "shards", "slices"), [(2, 2, 1), (1, 1, 2)])
def test_a_shard_that_sees_only_zeros_follows_the_others(replicas: int, shards: int, slices: int) -> None:
    for found in run_ranks(shards_and_slices, replicas * shards * slices, shards, slices, timeout_s=120):
        for name, apart in found.items():
            assert apart < 1e-6, f"{name}: {apart:.1e}"


# -- a step that torch makes up ----------------------------------------------------------------------


def asked_for_its_state_first(ask: bool) -> dict[str, Any]:
    """A LoRA pair under torch's checkpoint functions, which step once with lr 0 and zero gradients."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 3, bias=False), torch.nn.Linear(3, 8))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(3, 6, generator=generator))
        model[1].weight.zero_()
        model[1].bias.zero_()
    optimizer = LoRDO(model.named_parameters(), lr=1e-2, rank=2, sync_interval=3)
    if ask:
        get_optimizer_state_dict(model, optimizer)
    counted = [optimizer.attempted_steps, optimizer.executed_steps]
    for step in range(1, 8):
        data = torch.Generator().manual_seed(10 * step + dist.get_rank())
        inputs, wanted = torch.randn(4, 6, generator=data), torch.randn(4, 8, generator=data)
        optimizer.zero_grad()
        (model(inputs) - wanted).square().mean().backward()
        optimizer.step()
    basis = optimizer.state[model[0].weight]["0.weight"]["basis"]
    identity = torch.eye(*basis.shape)
    return {
        "weights": [p.detach().clone() for p in model.parameters()],
        "counted": counted,
        "steps": optimizer.attempted_steps,
        "moved": float((basis - identity).abs().max()),
    }


def both_ways() -> list[dict[str, Any]]:
    return [asked_for_its_state_first(ask) for ask in (False, True)]


@pytest.mark.parametrize("replicas", [1, 2])
def test_asking_torch_for_the_optimizers_state_before_the_first_step_changes_nothing(replicas: int) -> None:
    for plain, asked in run_ranks(both_ways, replicas, timeout_s=60):
        assert asked["counted"] == [0, 0] and asked["steps"] == 7
        assert all(torch.equal(a, b) for a, b in zip(plain["weights"], asked["weights"], strict=True))
        assert plain["moved"] > 0.1  # the basis of LoRA's A is not the identity


# -- what is said ------------------------------------------------------------------------------------


def test_many_matrices_without_a_gradient_are_told_of_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    named = [(f"h.{i}.weight", torch.nn.Parameter(torch.randn(4, 6))) for i in range(20)]
    optimizer = LoRDO(named, lr=1e-2, rank=2, sync_interval=4)
    with caplog.at_level(logging.DEBUG, logger="lordo_ds"):
        for _ in range(12):
            for _, parameter in named:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    told = [record.getMessage() for record in caplog.records if "had no gradient" in record.getMessage()]
    assert len(told) == 2, told  # one for a start, and a warning at the first sync after the first steps
    assert all("20 matrices have had no gradient" in line and "h.0.weight" in line for line in told)
    assert len(caplog.records) < 20
