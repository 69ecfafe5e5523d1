"""Who reads which sample: every sample once, the same ones however a global batch is divided."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.text import BatchShape, SampleOrder, train_batches, validation_batches

sizes = st.integers(1, 5)


@given(micro_batch=sizes, accumulation=sizes, ranks=sizes, steps=sizes)
def test_each_global_batch_is_the_next_run_of_sample_numbers(
    micro_batch: int, accumulation: int, ranks: int, steps: int
) -> None:
    shapes = [BatchShape(micro_batch, accumulation, ranks, rank) for rank in range(ranks)]
    batch = shapes[0].global_batch
    for step in range(steps):
        read = [n for shape in shapes for part in shape.micro_batch_numbers(step * batch) for n in part]
        assert read == list(range(step * batch, (step + 1) * batch))


def test_a_rank_reads_the_same_samples_however_they_are_accumulated() -> None:
    whole, cut = BatchShape(8, 1, 2, 1), BatchShape(2, 4, 2, 1)
    assert [n for part in whole.micro_batch_numbers(32) for n in part] == [
        n for part in cut.micro_batch_numbers(32) for n in part
    ]


@given(length=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_epoch_reads_every_sample_once_and_can_be_entered_anywhere(length: int, seed: int) -> None:
    order = SampleOrder(length, seed)
    numbers = [order[i] for i in range(4 * length)]
    assert Counter(numbers) == {index: 4 for index in range(length)}
    assert numbers[:length] == list(range(length)), "GPTDataset has shuffled the first epoch itself"
    again = SampleOrder(length, seed)
    assert [again[i] for i in reversed(range(4 * length))] == numbers[::-1]


def test_later_epochs_are_in_other_orders() -> None:
    order, other = SampleOrder(50, 0), SampleOrder(50, 1)
    epochs = [tuple(order[50 * epoch + i] for i in range(50)) for epoch in range(3)]
    assert len(set(epochs)) == 3
    assert epochs[1] != tuple(other[50 + i] for i in range(50))


class NumberedSamples:
    """Sample i consists of the token i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.full((3,), index)
        return {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(3), "position_ids": tokens}


def test_training_batches_follow_the_order_past_the_end_of_the_data() -> None:
    dataset, order = NumberedSamples(6), SampleOrder(6, 0)
    batches = list(train_batches(dataset, order, BatchShape(2, 2, 1, 0), consumed=4, device="cpu"))
    assert [batch["tokens"].shape for batch in batches] == [(2, 3), (2, 3)]
    assert torch.cat([batch["tokens"][:, 0] for batch in batches]).tolist() == [4, 5, order[6], order[7]]


@pytest.mark.parametrize("samples", [1, 5, 12, 17])
@pytest.mark.parametrize(("micro_batch", "ranks"), [(1, 1), (4, 1), (3, 2), (4, 4)])
def test_an_evaluation_counts_every_sample_once_in_equally_many_calls(
    samples: int, micro_batch: int, ranks: int
) -> None:
    counted: Counter[int] = Counter()
    calls = set()
    for rank in range(ranks):
        shape = BatchShape(micro_batch, 2, ranks, rank)
        batches = list(validation_batches(NumberedSamples(20), samples, shape, "cpu"))
        calls.add(len(batches))
        for batch in batches:
            assert batch["tokens"].shape == (micro_batch, 3)
            counted.update(batch["tokens"][batch["loss_mask"] > 0].tolist())
    assert len(calls) == 1, "a rank with fewer forward passes would hang the others under ZeRO-3"
    assert counted == {index: 3 for index in range(samples)}
