"""The data of `pretrain_gpt.py`: Megatron's GPTDataset over prepared tokens, and who reads what when."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from lordo_ds.data import PreparedData

Batch = dict[str, "Tensor"]


class Samples(Protocol):
    """What is read of a `GPTDataset`: sequences of seq_length tokens, with labels and loss_mask."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def open_datasets(data: PreparedData, seq_length: int, seed: int) -> tuple[Samples, Samples, int]:
    """One epoch of training samples, shuffled by `seed`; one of validation samples; from how many documents.

    Call it before the process group exists: Megatron then builds its index files in whichever process comes
    first (the lock sees to that), on every machine, without collectives or a shared file system.
    """
    import torch.distributed as dist
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from lordo_ds.data.cache import locked

    assert not dist.is_initialized(), "Megatron's barriers and the lock would wait for each other"
    held_out = data.held_out(min_tokens=seq_length + 1)
    index = data.folder / "index"
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([str(data.prefix)], None),
        split=f"{data.documents - held_out},{held_out},0",
        path_to_cache=str(index),
        tokenizer=data.tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    one_epoch = [None, None, None]
    with locked(index.with_suffix(".lock")):
        builder = BlendedMegatronDatasetBuilder(GPTDataset, one_epoch, lambda: True, config)
        train, valid, _ = builder.build()
    return train, valid, held_out


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is divided: over data-parallel ranks, then over micro-batches."""

    micro_batch: int
    accumulation: int
    data_parallel_size: int
    data_parallel_rank: int

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.data_parallel_size

    def micro_batch_numbers(self, consumed: int) -> Iterator[range]:
        """This rank's sample numbers in the global batch that starts at sample `consumed`.

        A rank reads one contiguous part, so how it is cut into micro-batches does not change what it reads.
        """
        start = consumed + self.data_parallel_rank * self.accumulation * self.micro_batch
        for micro_step in range(self.accumulation):
            first = start + micro_step * self.micro_batch
            yield range(first, first + self.micro_batch)


class SampleOrder:
    """From the endless sample number to an index into one epoch; every epoch after the first is reshuffled.

    It depends on nothing but its arguments, so a run resumed at another step or on other ranks goes on where
    the first one stopped, and a longer run begins like a shorter one.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self._epoch = 0
        self._permutation: np.ndarray | None = None

    def __getitem__(self, number: int) -> int:
        epoch, position = divmod(number, self.length)
        if epoch == 0:
            return position  # GPTDataset has shuffled this one
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        assert self._permutation is not None
        return int(self._permutation[position])


def stack(samples: list[dict[str, Any]], device: Any) -> Batch:
    """Tokens, labels and loss_mask, each (samples, seq_length), on `device`."""
    import torch

    keys = ("tokens", "labels", "loss_mask")
    return {key: torch.stack([sample[key] for sample in samples]).to(device) for key in keys}


def train_batches(
    dataset: Samples, order: SampleOrder, shape: BatchShape, consumed: int, device: Any
) -> Iterator[Batch]:
    """This rank's micro-batches of the global batch that starts at sample `consumed`."""
    for numbers in shape.micro_batch_numbers(consumed):
        yield stack([dataset[order[number]] for number in numbers], device)


def validation_batch_count(samples: int, shape: BatchShape) -> int:
    """How many batches `validation_batches` yields."""
    return math.ceil(samples / (shape.micro_batch * shape.data_parallel_size))


def validation_batches(dataset: Samples, samples: int, shape: BatchShape, device: Any) -> Iterator[Batch]:
    """This rank's part of the first `samples` samples; as many batches on every rank, the surplus masked out.

    As many, because the forward pass may itself be a collective (ZeRO-3); masked, so that the mean does not
    depend on the number of ranks.
    """
    at_once = shape.micro_batch * shape.data_parallel_size
    for start in range(0, samples, at_once):
        first = start + shape.data_parallel_rank * shape.micro_batch
        numbers = range(first, first + shape.micro_batch)
        batch = stack([dataset[number % samples] for number in numbers], device)
        batch["loss_mask"][max(0, samples - first) :] = 0.0
        yield batch
