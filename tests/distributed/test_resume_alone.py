"""An optimizer without an engine, saved and loaded between syncs by the processes that train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lordo_ds import CheckpointError, LoRDO
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS, SAVED_AT = 10, 6  # syncs at 4 and 8: at 6 the replicas differ


def start(seed: int, rank: int = 2) -> tuple[torch.nn.Parameter, LoRDO]:
    weight = torch.nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)))
    return weight, LoRDO([("a.weight", weight)], lr=1e-2, rank=rank, sync_interval=4, preset="recommended")


def train(weight: torch.nn.Parameter, optimizer: LoRDO, first: int, last: int) -> None:
    for step in range(first, last + 1):
        weight.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))
        optimizer.step()


def whole_and_resumed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weights of an undisturbed run; of one that a new process goes on with; and when those were loaded."""
    weight, optimizer = start(0)
    train(weight, optimizer, 1, SAVED_AT)
    saved = weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
    train(weight, optimizer, SAVED_AT + 1, STEPS)

    again, fresh = start(1)
    with torch.no_grad():
        again.copy_(saved[0])
    fresh.load_state_dict(saved[1])
    loaded = again.detach().clone() - saved[0]
    train(again, fresh, SAVED_AT + 1, STEPS)
    return weight.detach(), again.detach(), loaded


def test_every_replica_goes_on_with_its_own_weights() -> None:
    found = run_ranks(whole_and_resumed, 2)
    assert not torch.equal(found[0][0], found[1][0])  # the last sync was at 8
    for whole, resumed, changed in found:
        assert not changed.any() and torch.equal(whole, resumed)


def refused() -> dict[str, Any]:
    rank = dist.get_rank()
    weight, optimizer = start(0)
    train(weight, optimizer, 1, SAVED_AT)
    other, fresh = start(rank, rank=3)
    before = other.detach().clone()
    with pytest.raises(CheckpointError, match="rank"):
        fresh.load_state_dict(optimizer.state_dict())
    unchanged = torch.equal(other, before) and not fresh.state and fresh.sync is None
    train(other, fresh, 1, 4)
    return {"unchanged": unchanged, "weight": other.detach()}


def test_a_refused_state_changes_nothing_and_training_starts_as_without_it() -> None:
    first, second = run_ranks(refused, 2)
    assert first["unchanged"] and second["unchanged"]
    assert torch.equal(first["weight"], second["weight"])


def one_rank_refuses() -> dict[str, str]:
    """A forged state on rank 1 only: what both ranks are told, and whether both can train then."""
    rank, said = dist.get_rank(), {}
    weight, optimizer = start(0)
    train(weight, optimizer, 1, SAVED_AT)
    weights = weight.detach().clone()

    def state_of(forge: Any) -> dict[str, Any]:
        state = copy.deepcopy(optimizer.state_dict())
        if rank == 1:
            forge(state, state["state"][0]["a.weight"])
        return state

    forged = {
        "header": lambda state, _: state.pop("lordo"),
        "shape": lambda _, entry: entry.update(exp_avg=entry["exp_avg"].t().contiguous()),
        "dtype": lambda _, entry: entry.update(exp_avg=entry["exp_avg"].double()),
        "anchor": lambda _, entry: entry["anchor"].fill_(float("nan")),
    }
    for name, forge in forged.items():
        other, fresh = start(1)
        with torch.no_grad():
            other.copy_(weights)
        with pytest.raises(CheckpointError) as caught:
            fresh.load_state_dict(state_of(forge))
        assert torch.equal(other, weights) and fresh.sync is None and not fresh.state
        said[name] = str(caught.value)
    other, fresh = start(1)
    with torch.no_grad():
        other.copy_(weights)
    fresh.load_state_dict(state_of(lambda _, entry: entry["exp_avg"].fill_(float("nan"))))
    train(other, fresh, SAVED_AT + 1, STEPS)
    assert bool(torch.isfinite(other).all()), "the next sync reseeded it"
    return said


def test_a_state_that_one_rank_cannot_load_is_refused_on_all() -> None:
    first, second = run_ranks(one_rank_refuses, 2)
    assert first == second
    assert "was not saved by LoRDO" in first["header"]
    assert "exp_avg" in first["shape"] and "float64" in first["dtype"]
    assert "'anchor' of a.weight is not finite in replica 1" in first["anchor"]
