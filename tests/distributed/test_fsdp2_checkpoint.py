"""Sharded models through torch.distributed.checkpoint: saved between syncs, each replica in a folder of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from lordo_ds import CheckpointError, LoRDO, replica_group, replica_mesh
from tests import sharded
from tests.cases import run_cases
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS, SAVED_AT = 9, 5  # syncs at 3, 6 and 9: at 5 the replicas differ
SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "eps": 1e-2,
    "rank": 3,
    "sync_interval": 3,
    "qh_mode": "factored",
    "error_feedback": "fp32",
    "outer": {"lr": 0.7, "momentum": 0.7},
}
LAYOUTS = [(2, 2, 1), (1, 3, 1), (2, 1, 2), (1, 2, 2)]  # replicas, shards, tensor


class Run:
    """A model on its mesh and its optimizer; weights start at what is given plus `shift`. 0 shards: it stays whole."""

    def __init__(
        self, shards: int, tensor: int, shift: float = 0.0, dtype: torch.dtype = torch.float32, **settings: Any
    ) -> None:
        if shards:
            self.model, self.mesh = sharded.replicas_of(shards, tensor, dtype)
        else:
            self.model, self.mesh, shards = sharded.Weights(dtype), replica_mesh("cpu"), 1
        self.replica, self.shard, self.index = sharded.place_of(self.mesh)
        self.shards, self.tensor, self.dtype = shards, tensor, dtype
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(shift)
        self.optimizer = LoRDO(self.model, mesh=self.mesh, **{**SETTINGS, **settings})

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.optimizer.zero_grad()
            slices = (self.index, self.tensor)
            self.model(
                sharded.given(step, self.replica, self.shard, self.shards, slices, self.dtype)
            ).backward()  # fmt: skip
            self.optimizer.step()
        self.optimizer.zero_grad()

    def where(self, folder: str) -> dict[str, Any]:
        """A folder of the replica, and its ranks."""
        group = replica_group(self.mesh)
        assert dist.get_world_size(group) == self.shards * self.tensor
        return {"checkpoint_id": Path(folder, f"replica_{self.replica}"), "process_group": group}

    def save(self, folder: str) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, **self.where(folder))

    def load(self, folder: str) -> None:
        """As torch's guide does: the states of the fresh run say what is to be read, and where to."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        dcp.load(state, **self.where(folder))
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def tensors(self) -> dict[str, Tensor]:
        """This rank's weights and states."""
        assert self.optimizer.sync is not None
        found = {item.plan.name: item.weight.clone() for item in self.optimizer.sync.items}
        for item in self.optimizer.sync.items:
            found |= {f"{item.plan.name} {k}": v.clone() for k, v in item.state.items() if isinstance(v, Tensor)}
        return found

    def whole(self) -> dict[str, Tensor]:
        return {name: sharded.whole(parameter) for name, parameter in self.model.named_parameters()}


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def resumed(folder: str, shards: int, tensor: int, **settings: Any) -> dict[str, Any]:
    straight = Run(shards, tensor, **settings)
    straight.train(1, SAVED_AT)
    straight.save(folder)
    saved = straight.tensors()
    in_memory = copy.deepcopy(get_state_dict(straight.model, straight.optimizer))
    straight.train(SAVED_AT + 1, STEPS)
    found: dict[str, Any] = {"ends": {k: v for k, v in straight.tensors().items() if " " not in k}}

    again = Run(shards, tensor, shift=1.0 + dist.get_rank(), **settings)
    again.load(folder)
    found["loaded"] = differences(again.tensors(), saved)
    found["counters"] = again.optimizer.attempted_steps, again.optimizer.next_sync_in
    again.train(SAVED_AT + 1, STEPS)
    found["trained"] = differences(again.tensors(), straight.tensors())

    # A file of its own for each rank serves as well.
    file = Path(folder, f"rank_{dist.get_rank()}.pt")
    torch.save(in_memory, file)
    in_memory = torch.load(file, weights_only=True)
    at_once = Run(shards, tensor, shift=1.0, **settings)  # the weights first, and nothing asked of the optimizer before
    set_model_state_dict(at_once.model, in_memory[0])
    set_optimizer_state_dict(at_once.model, at_once.optimizer, in_memory[1])
    found["loaded at once"] = differences(at_once.tensors(), saved)
    at_once.train(SAVED_AT + 1, STEPS)
    found["trained at once"] = differences(at_once.tensors(), straight.tensors())
    return found


OWNERS = {"pseudo_gradient_dtype": "int8", "outer": {"momentum": 0.7, "orthogonalize": True, "compute": "owner"}}


@pytest.mark.parametrize(
    ("replicas", "shards", "tensor", "settings"),
    [*((*layout, {}) for layout in [*LAYOUTS, (2, 0, 1)]), (2, 2, 1, OWNERS), (2, 1, 2, OWNERS)],
)
def test_a_run_goes_on_bitwise(
    tmp_path: Path, replicas: int, shards: int, tensor: int, settings: dict[str, Any]
) -> None:
    world = replicas * max(1, shards) * tensor
    found = run_ranks(resumed, world, str(tmp_path), shards, tensor, **settings, timeout_s=120)
    for one in found:
        assert not one["loaded"] and not one["loaded at once"]
        assert one["counters"] == (SAVED_AT, 1)
        assert not one["trained"] and not one["trained at once"]
    if replicas == 2:  # they differed when they were saved
        assert (tmp_path / "replica_1" / ".metadata").exists()


def saved_and_ended(folder: str) -> dict[str, Tensor]:
    run = Run(2, 1, dtype=torch.float64)
    run.train(1, SAVED_AT)
    run.save(folder)
    with_one_gradient(run, SAVED_AT + 1, STEPS)
    return run.whole()


def resumed_on_others(folder: str, shards: int) -> dict[str, Tensor]:
    run = Run(shards, 1, shift=1.0, dtype=torch.float64)
    run.load(folder)
    with_one_gradient(run, SAVED_AT + 1, STEPS)
    return run.whole()


def with_one_gradient(run: Run, first: int, last: int) -> None:
    """All shards on the data of the first, so that their number does not matter."""
    run.shard = 0
    run.train(first, last)


@pytest.mark.parametrize("shards", [1, 3])
def test_another_number_of_shards_goes_on_too(tmp_path: Path, shards: int) -> None:
    ended = run_ranks(saved_and_ended, 2, str(tmp_path), timeout_s=60)[0]
    for found in run_ranks(resumed_on_others, shards, str(tmp_path), shards, timeout_s=60):
        assert max(float((found[name] - ended[name]).abs().max()) for name in ended) < 1e-9


def save_with_owners(folder: str) -> None:
    run = Run(2, 1, **OWNERS)
    run.train(1, SAVED_AT)
    run.save(folder)


def load_with_owners(folder: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Run(1, 1, **OWNERS).load(folder)
    return str(caught.value)


def test_what_the_owners_keep_goes_to_as_many_shards_only(tmp_path: Path) -> None:
    run_ranks(save_with_owners, 4, str(tmp_path), timeout_s=60)
    for said in run_ranks(load_with_owners, 2, str(tmp_path), timeout_s=60):
        assert "(shards, tensor slices) (2, 1)" in said and "load it with as many" in said


def full_states(shards: int, tensor: int) -> dict[str, dict[str, Any]]:
    """Of a whole model, as torch puts its states together."""
    run = Run(shards, tensor, dtype=torch.float64)
    with_one_gradient(run, 1, SAVED_AT)
    options = StateDictOptions(full_state_dict=True)
    states = get_optimizer_state_dict(run.model, run.optimizer, options=options)["state"]
    return {name: entries for of_parameter in states.values() for name, entries in of_parameter.items()}


@pytest.mark.parametrize(("shards", "tensor"), [(2, 1), (3, 1), (2, 2)])
def test_torch_puts_the_states_of_the_whole_model_together(shards: int, tensor: int) -> None:
    """Those of one rank, but for matrices that tensor parallelism gives a basis on the other side."""
    (exact,) = run_ranks(full_states, 1, 1, 1, timeout_s=60)
    found = run_ranks(full_states, shards * tensor, shards, tensor, timeout_s=60)[0]
    assert found.keys() == exact.keys()
    for name in found.keys() - ({"square.weight"} if tensor > 1 else set()):
        assert found[name].keys() == exact[name].keys()
        for key, value in exact[name].items():
            if isinstance(value, Tensor):
                assert found[name][key].shape == value.shape, (name, key)
                torch.testing.assert_close(found[name][key], value, rtol=1e-7, atol=1e-9, msg=f"{key} of {name}")
            else:
                assert found[name][key] == value


# -- before the first step, and what does not fit ------------------------------------------------------


def asked_first(ask: bool) -> dict[str, Tensor]:
    run = Run(2, 1, shift=float(dist.get_rank() // 2))  # the replicas start differently
    if ask:
        before = run.whole()
        states = get_optimizer_state_dict(run.model, run.optimizer)
        assert run.optimizer.attempted_steps == 0 and len(states["state"]) == 6
        assert not differences(run.whole(), before), "no weight moves before the first step"
    run.train(1, STEPS)
    return run.tensors()


def test_asking_for_the_state_before_the_first_step_changes_nothing() -> None:
    found = run_cases(asked_first, 4, {ask: (ask,) for ask in (False, True)}, timeout_s=60)
    for plain, asked in zip(found[False], found[True], strict=True):
        assert not differences(plain, asked)


def saved_before_it(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trained from the start, and from what was saved there, when the replicas still differed."""
    run = Run(2, 1, shift=float(dist.get_rank() // 2))
    get_optimizer_state_dict(run.model, run.optimizer)
    run.save(folder)
    run.train(1, STEPS)
    again = Run(2, 1, shift=7.0)
    again.load(folder)
    again.train(1, STEPS)
    return run.tensors(), again.tensors()


def test_a_state_saved_before_the_first_step_starts_the_run(tmp_path: Path) -> None:
    for run, again in run_ranks(saved_before_it, 4, str(tmp_path), timeout_s=60):
        assert not differences(run, again)


def skipped_after_it_was_asked() -> bool:
    """One replica leaves its first step out, the others do not: none waits for what the other does not do."""
    run = Run(1, 1)
    get_optimizer_state_dict(run.model, run.optimizer)
    if run.replica == 0:
        run.optimizer.skip_step()
    else:
        run.train(1, 1)
    run.train(2, 3)
    return run.optimizer.synced


def test_a_replica_may_leave_out_its_first_step_after_it() -> None:
    assert run_ranks(skipped_after_it_was_asked, 2, timeout_s=30) == [True, True]


def refusals(folder: str) -> dict[str, str]:
    """What is said of a state that does not fit; nothing is changed."""
    run = Run(2, 1)
    run.train(1, SAVED_AT)
    run.save(folder)
    said: dict[str, str] = {}

    def refused(name: str, load: Any) -> None:
        before = run.tensors()
        with pytest.raises(CheckpointError) as caught:
            load()
        said[name] = str(caught.value)
        assert not differences(run.tensors(), before)

    state = get_optimizer_state_dict(run.model, run.optimizer)
    state["param_groups"][0]["lordo"]["mesh"]["replica"] = 1 - run.replica
    refused("another replica's", lambda: run.optimizer.load_state_dict(state))
    flat = get_optimizer_state_dict(
        run.model, run.optimizer, options=StateDictOptions(flatten_optimizer_state_dict=False)
    )
    del flat["param_groups"][0]["lordo"]
    refused("no header", lambda: run.optimizer.load_state_dict(flat))
    other = get_optimizer_state_dict(run.model, run.optimizer)
    other["state"]["another"] = other["state"].pop("bias")
    refused("another parameter's", lambda: run.optimizer.load_state_dict(other))
    refused("no groups", lambda: run.optimizer.load_state_dict({"state": {}}))
    return said


def test_states_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    found = run_ranks(refusals, 4, str(tmp_path), timeout_s=60)
    for rank, said in enumerate(found):
        assert f"replica: saved {1 - rank // 2}, this run {rank // 2}" in said["another replica's"]
        assert "was not saved by LoRDO" in said["no header"]
        assert "'another' belongs to no parameter of its groups" in said["another parameter's"]
        assert "flatten_optimizer_state_dict" in said["no groups"]


def one_rank_refuses() -> tuple[str, bool]:
    """A state without groups on rank 1 only, for an optimizer that has not attached; whether both can train then."""
    run = Run(2, 1)
    run.train(1, SAVED_AT)
    state = run.optimizer.state_dict() if dist.get_rank() == 0 else {"state": {}}
    fresh = Run(2, 1)
    with pytest.raises(CheckpointError) as caught:
        fresh.optimizer.load_state_dict(state)
    fresh.train(1, 3)
    return str(caught.value), fresh.optimizer.synced


def test_a_state_that_one_rank_cannot_load_is_refused_on_all() -> None:
    first, second = run_ranks(one_rank_refuses, 2, timeout_s=30)
    assert first == second and first[1] and "no parameter groups" in first[0]
