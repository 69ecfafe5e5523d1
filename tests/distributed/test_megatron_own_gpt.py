"""A GPT in Megatron's own training loop, cut over tensor-parallel ranks or pipeline stages, in replicas, with LoRDO."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lordo_ds.core.schedule import sync_plan
from tests.collectives import CollectiveCounter
from tests.gpts import start_megatron
from tests.own_loop import Loop
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.megatron,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs Megatron on the CPU"),
]

STEPS, INTERVAL, SEQUENCE, VOCABULARY, MICRO_BATCH = 9, 4, 16, 64, 2


def gpt(tensor: int, pipe: int, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=48,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipe,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    config.finalize_model_grads_func = finalize_model_grads
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    set_weights(model, tensor)
    return (Float16Module(config, model) if dtype == torch.bfloat16 else model), config


@torch.no_grad()
def set_weights(model: nn.Module, tensor: int) -> None:
    """Weights that depend on the parameter's name alone, however the model is cut."""
    from megatron.core import parallel_state

    from megatron_patches.optimizer import named_facts
    from megatron_patches.params import describe, shard_of

    for parameter, fact in named_facts(model, tensor).items():
        name = fact.name.replace("output_layer.weight", "embedding.word_embeddings.weight")
        cut = describe(name, parameter)
        shape = [side * (tensor if dim == cut.dim else 1) for dim, side in enumerate(parameter.shape)]
        if parameter.dim() == 1:
            continue  # norms start at 1
        drawn = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        rank = parallel_state.get_tensor_model_parallel_rank()
        parameter.copy_(shard_of(drawn, cut.dim, cut.stride, rank, tensor))


def batches_of(step: int, replica: int) -> list[Tensor]:
    """Two micro-batches of sequences that count in steps of 3."""
    generator = torch.Generator().manual_seed(1000 * step + replica)
    starts = torch.randint(0, VOCABULARY, (2, MICRO_BATCH, 1), generator=generator)
    return list((starts + 3 * torch.arange(SEQUENCE + 1)) % VOCABULARY)


def forward_step(batches: Iterator[Tensor], model: nn.Module) -> Any:
    tokens = next(batches)
    positions = torch.arange(SEQUENCE, device="cuda").expand(MICRO_BATCH, SEQUENCE)  # as on a GPU
    output = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())

    def mean_loss(losses: Tensor) -> Any:
        mean = losses.float().mean()
        return mean, {"loss": mean.detach()}

    return output, mean_loss


def train(tensor: int, pipe: int, dtype: torch.dtype) -> dict[str, Any]:
    """Two replicas of tensor x pipe ranks; step, loss (last stage only) and norm of each step, and what was sent."""
    start_megatron(tensor, pipe)
    model, config = gpt(tensor, pipe, dtype)
    settings = {"rank": 8, "sync_interval": INTERVAL, "outer": {"lr": 1.0, "momentum": 0.0}}
    loop = Loop.of(model, config, 1, dtype, settings=settings, weight_decay=0.0, adam_eps=1e-4)
    handle, lordo = loop.optimizer.handle, loop.optimizer.optimizer
    replica_of = gathered(handle.replica_index)
    crossed, sent, seen = [], [], []
    with CollectiveCounter() as counter:
        for step in range(1, STEPS + 1):
            counter.phase(str(step))
            (executed, norm, _), losses = loop.step(
                batches_of(step, handle.replica_index), forward_step, SEQUENCE, MICRO_BATCH
            )
            assert executed
            seen.append((float(sum(one["loss"] for one in losses)) / 2 if losses else None, norm))
            plan = sync_plan(lordo.config, step)
            if plan.due:
                sent.append((lordo.last_report.bytes_sent, lordo.sync.predicted_bytes(plan, rows=0, row_length=0)))
            elif step > 1:
                crossed += counter.crossing(replica_of, str(step))
        handle.finish()
    copies = {n: p.detach().float() for n, p in model.named_parameters() if "embed" in n or "output_layer" in n}
    return {
        "replica": handle.replica_index,
        "seen": seen,
        "crossed": crossed,
        "sent": sent,
        "tied": next(iter(copies.values()), None),
        "names": [plan.name for plan in lordo.plans],
    }


def gathered(value: int) -> list[int]:
    everywhere = [0] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    return everywhere


@pytest.fixture(scope="module")
def uncut() -> list[dict[str, Any]]:
    return run_ranks(train, 2, 1, 1, torch.float32)


def check(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert not rank["crossed"], "something crossed replicas between syncs"
        assert len(rank["sent"]) == STEPS // INTERVAL
        assert all(sent == predicted > 0 for sent, predicted in rank["sent"])
        losses = [loss for loss, _ in rank["seen"] if loss is not None]
        assert not losses or losses[-1] < losses[0] - 0.5


def test_a_gpt_learns_and_nothing_crosses_replicas_between_syncs(uncut: list[dict[str, Any]]) -> None:
    check(uncut)
    assert uncut[0]["seen"] != uncut[1]["seen"]
    assert torch.equal(uncut[0]["tied"], uncut[1]["tied"]), "finish() syncs"


@pytest.mark.parametrize(("tensor", "pipe"), [(2, 1), (1, 2)], ids=["tensor-parallel", "pipeline"])
def test_a_cut_gpt_trains_as_the_uncut_one_does(uncut: list[dict[str, Any]], tensor: int, pipe: int) -> None:
    found = run_ranks(train, 4, tensor, pipe, torch.float32)
    check(found)
    for rank in found:
        for (loss, norm), (expected_loss, expected_norm) in zip(
            rank["seen"], uncut[rank["replica"]]["seen"], strict=True
        ):
            assert loss is None or loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
    assert {name for rank in found for name in rank["names"]} >= set(uncut[0]["names"])
    if pipe > 1:
        assert torch.equal(found[0]["tied"], found[-1]["tied"]), "the last stage's copy of the embedding differs"


def test_a_gpt_in_bf16_learns_across_pipeline_stages() -> None:
    check(run_ranks(train, 4, 1, 2, torch.bfloat16))
