"""What is seen of weights that change between two steps, in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lordo_ds import ConfigError, LoRDO
from lordo_ds.errors import SyncError
from lordo_ds.replica.samples import SAMPLES, Samples


def samples(*tensors: torch.Tensor) -> Samples:
    return Samples((i, tensor, tensor.shape[-1]) for i, tensor in enumerate(tensors))


def test_a_change_of_any_bit_of_a_small_tensor_is_seen() -> None:
    tensors = [torch.randn(8, 8), torch.randn(3).to(torch.bfloat16), torch.zeros(0), torch.tensor([0.0, float("nan")])]
    before = samples(*tensors)
    assert samples(*tensors).changes(before) == {} and not bool(samples(*tensors).differs(before))
    tensors[3][0] = -0.0
    assert list(samples(*tensors).changes(before)) == [3] and bool(samples(*tensors).differs(before))
    tensors[0] *= 1.5
    assert samples(*tensors).changes(before)[0] == pytest.approx(0.5)


@pytest.mark.parametrize("columns", [1, 16, 64, 1000, 1024])
def test_few_elements_of_a_large_matrix_are_looked_at_in_all_its_columns(columns: int) -> None:
    weight = torch.zeros(2048, columns)
    before = samples(weight)
    assert SAMPLES / 3 < len(before.of(0)) <= SAMPLES
    for first in range(0, columns, -(-columns // 8)):  # an eighth of them
        weight[:, first : first + -(-columns // 8)] = 1.0
        assert samples(weight).changes(before) == {0: float("inf")}
        weight.zero_()
        assert samples(weight).changes(before) == {}


SHAPE = (6, 8)


def trained(change: Any = None, step_of_change: int = 5, **settings: Any) -> tuple[torch.Tensor, LoRDO]:
    """One replica with an outer optimizer, whose sync is due at steps 3 and 6."""
    weight = torch.nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    optimizer = LoRDO([("w", weight)], lr=1e-3, rank=2, sync_interval=3, preset="recommended", **settings)
    for step in range(1, 7):
        if step == step_of_change and change is not None:
            change(weight)
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return weight, optimizer


def loaded(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight.fill_(5.0)


def loaded_in_data(weight: torch.nn.Parameter) -> None:
    weight.data.fill_(5.0)


def swapped(weight: torch.nn.Parameter) -> None:
    kept = weight.detach().clone()
    loaded(weight)
    with torch.no_grad():
        weight.copy_(kept)


def resized(weight: torch.nn.Parameter) -> None:
    weight.grad, weight.data = None, torch.zeros(7, 8)


@pytest.mark.parametrize("change", [loaded, loaded_in_data])
@pytest.mark.parametrize("step", [2, 4, 5])
def test_what_is_loaded_is_where_the_next_sync_starts_from(change: Any, step: int) -> None:
    weight, optimizer = trained(change, step)
    assert float((weight.detach() - 5.0).norm() / weight.detach().norm()) < 0.01
    state = optimizer.state[weight]["w"]
    assert torch.equal(state["anchor"], weight.detach().view(-1))


def test_a_swap_that_is_undone_changes_nothing() -> None:
    assert torch.equal(trained(swapped)[0], trained()[0])


def test_a_parameter_of_another_shape_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"w is \(7, 8\) at step 5, and was \(6, 8\)"):
        trained(resized)


def test_what_is_loaded_after_a_final_sync_that_had_nothing_to_do_is_trained_too() -> None:
    weight, optimizer = trained()
    assert not optimizer.final_sync()
    loaded(weight)
    for _ in range(3):
        weight.grad = torch.ones(SHAPE)
        optimizer.step()
    assert float((weight.detach() - 5.0).abs().max()) < 0.1


def test_a_final_sync_starts_from_what_was_loaded_too() -> None:
    weight, optimizer = trained()
    weight.grad = torch.ones(SHAPE)
    optimizer.step()
    loaded(weight)
    assert optimizer.final_sync()
    assert torch.equal(weight, torch.full(SHAPE, 5.0))


def test_on_an_accelerator_an_open_write_is_taken_over_and_a_hidden_one_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There nobody waits for the device: version counters tell when it is worth it, and writes to .data move none."""
    monkeypatch.setattr(Samples, "on_host", False)
    weight, _ = trained(loaded)
    assert float((weight.detach() - 5.0).norm() / weight.detach().norm()) < 0.01
    assert torch.equal(trained(swapped)[0], trained()[0])
    with pytest.raises(SyncError, match=r"before step 6 through \.data"):
        trained(loaded_in_data)
