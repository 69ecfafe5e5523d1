"""The GPT in pipeline stages is the GPT in one piece: the same first weights, losses, gradients and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_patches.gradients import sum_partial_gradients
from megatron_patches.params import describe, shard_of
from pretrain.gpt import GptConfig, build_gpt, loss_sums
from tests.gpts import start_megatron
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.megatron,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs Megatron on the CPU"),
]

BASE = GptConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, seq_length=16, vocab_size=64, init_std=0.1
)
VARIANTS = {
    "rope, swiglu, tied": BASE,
    "grouped queries, norms of queries and keys, own head, recomputed": replace(
        BASE, num_query_groups=2, qk_layernorm=True, tie_embeddings=False, recompute=True
    ),
    "layer norm, learned positions, gelu, biases, tied": replace(
        BASE, normalization="LayerNorm", position_embedding="learned", activation="gelu", bias=True
    ),
}
MICRO_BATCHES = 3


def start(tensor: int, pipe: int, seed: int = 7) -> None:
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    start_megatron(tensor, pipe, seed)


def batch(seed: int) -> dict[str, Tensor]:
    """Micro-batches with as many masked tokens as their seed says, and one."""
    ids = torch.randint(0, BASE.vocab_size, (3, BASE.seq_length + 1), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(3, BASE.seq_length)
    mask[0, : seed + 1] = 0.0
    return {"tokens": ids[:, :-1], "labels": ids[:, 1:].contiguous(), "loss_mask": mask}


def pipe_batches(seeds: range) -> Iterator[Any]:
    for seed in seeds:
        one = batch(seed)
        yield one["tokens"], (one["labels"], one["loss_mask"])


def assert_parts_of(module: Any, whole: dict[str, Tensor], atol: float, what: str) -> set[str]:
    """Every parameter of this stage and tensor rank is its part of the whole one; gives the whole names."""
    from megatron.core import parallel_state

    names = set()
    for name, parameter in module.named_parameters():
        facts = describe(name, parameter)
        index = parallel_state.get_tensor_model_parallel_rank()
        count = parallel_state.get_tensor_model_parallel_world_size()
        expected = shard_of(whole[module.name_in_one_piece(name)], facts.dim, facts.stride, index, count)
        torch.testing.assert_close(
            parameter.detach(), expected, rtol=0, atol=atol, msg=lambda m, n=name: f"{what}: {n}: {m}"
        )
        names.add(module.name_in_one_piece(name))
    return names


def step_in_one_piece(config: GptConfig, seeds: range) -> tuple[dict[str, Tensor], dict[str, Tensor], float, float]:
    """First weights, weights after a step of plain SGD (lr 1), loss of the step, and mean over all tokens before."""
    start(1, 1)
    model = build_gpt(config, torch.float32)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    sums = [loss_sums(model, batch(seed)) for seed in seeds]
    loss = torch.stack([total / count for total, count in sums]).mean()
    loss.backward()
    after = {name: (p - p.grad).detach() for name, p in model.named_parameters() if p.grad is not None}
    return first, after, float(loss.detach()), float(sum(t for t, _ in sums).detach() / sum(c for _, c in sums))


def pipe_equals_one_piece(tensor: int, pipe: int, variants: list[str]) -> None:
    import deepspeed
    from megatron.core import parallel_state

    from pretrain.gpt_pipe import GPTModelPipe

    for variant in variants:
        config = VARIANTS[variant]
        copies = torch.distributed.get_world_size() // (tensor * pipe)
        first, after, loss, mean = step_in_one_piece(config, range(copies * MICRO_BATCHES))
        start(tensor, pipe)
        model = GPTModelPipe(config, torch.float32)
        names = assert_parts_of(model, first, 0.0, f"{variant}: first weights")
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, names)
        assert set().union(*everyone) == first.keys(), "a parameter is on no stage"
        sum_partial_gradients(model)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            config={
                "train_micro_batch_size_per_gpu": 3,
                "gradient_accumulation_steps": MICRO_BATCHES,
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": 1 if config.qk_layernorm else 0},
            },
        )
        mine = parallel_state.get_data_parallel_rank() * MICRO_BATCHES
        seeds = range(mine, mine + MICRO_BATCHES)
        engine.eval_batch(pipe_batches(seeds), num_micro_batches=MICRO_BATCHES)
        sums = torch.stack(model.evaluated).sum(0) if model.evaluated else torch.zeros(2)
        assert bool(model.evaluated) == (engine.is_last_stage())
        torch.distributed.all_reduce(sums)
        assert float(sums[0] / sums[1]) == pytest.approx(mean, abs=1e-6), variant
        found = float(engine.train_batch(pipe_batches(seeds)))
        assert found == pytest.approx(loss, abs=1e-6), variant
        assert len(model.evaluated) in (0, MICRO_BATCHES), "training is no evaluation"
        assert_parts_of(model, after, 1e-6, f"{variant}: after a step")
        engine.destroy()


def test_two_stages_of_two_tensor_ranks_start_and_step_as_one_piece_does() -> None:
    run_ranks(pipe_equals_one_piece, 4, 2, 2, list(VARIANTS))


def test_four_stages_and_two_stages_twice_do_too() -> None:
    run_ranks(pipe_equals_one_piece, 4, 1, 4, [next(iter(VARIANTS))])
    run_ranks(pipe_equals_one_piece, 4, 1, 2, [list(VARIANTS)[1]])


def train_with_dropout(recompute: bool, keys: dict[str, Any]) -> list[float]:
    import deepspeed

    from pretrain.gpt_pipe import GPTModelPipe

    start(2, 2)
    model = GPTModelPipe(replace(BASE, dropout=0.2, recompute=recompute), torch.float32)
    parameters = list(model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        **keys,
    }
    torch.manual_seed(11)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    return [float(engine.train_batch(pipe_batches(range(2)))) for _ in range(4)]


def test_recomputation_repeats_the_dropout_of_every_rank() -> None:
    kept = run_ranks(train_with_dropout, 4, False, {})
    recomputed = run_ranks(train_with_dropout, 4, True, {})
    assert kept[0] == pytest.approx(recomputed[0], abs=1e-5)
    assert kept[0][-1] < kept[0][0]
    assert all(losses == kept[0] for losses in kept), "every rank is told the loss"
