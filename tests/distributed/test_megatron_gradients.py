"""Gradients under tensor parallelism are those of the uncut model, those that Megatron's own loop sums included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_patches import cpu
from megatron_patches.gradients import sum_partial_gradients
from megatron_patches.mpu import MegatronMPU
from megatron_patches.params import describe, describe_model, whole
from pretrain.gpt import GptConfig, build_gpt, loss_sums
from tests.gpts import start_megatron
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.megatron,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs Megatron on the CPU"),
]

BASE = GptConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, seq_length=16, vocab_size=64, init_std=0.1
)
VARIANTS = {
    "rope, swiglu, tied": BASE,
    "grouped queries, norms of queries and keys, own head": replace(
        BASE, num_query_groups=2, qk_layernorm=True, tie_embeddings=False
    ),
    "layer norm, learned positions, gelu, biases, tied": replace(
        BASE, normalization="LayerNorm", position_embedding="learned", activation="gelu", bias=True
    ),
    "everything, recomputed": replace(
        BASE, num_query_groups=2, qk_layernorm=True, tie_embeddings=False, bias=True, recompute=True
    ),
}


def batch(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, BASE.vocab_size, (3, BASE.seq_length + 1), generator=torch.Generator().manual_seed(seed))
    return {"tokens": ids[:, :-1], "labels": ids[:, 1:].contiguous(), "loss_mask": torch.ones(3, BASE.seq_length)}


def mean_loss(model: nn.Module, seed: int) -> Tensor:
    total, count = loss_sums(model, batch(seed))
    return total / count


def gather(name: str, parameter: nn.Parameter, value: Tensor) -> Tensor:
    """The whole of what every tensor-parallel rank has a part of."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    facts = describe(name, parameter)
    shards = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, value.contiguous(), group=group)
    if facts.dim is None:
        assert all(torch.equal(shard, shards[0]) for shard in shards), f"{name} differs between ranks"
    return whole(shards, facts.dim, facts.stride)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: gather(name, p, p.grad) for name, p in model.named_parameters() if p.grad is not None}


def gradients_of_all_variants() -> dict[str, list[dict[str, Tensor]]]:
    """By variant: on one rank, and on two with the sums."""
    found = {}
    for variant, config in VARIANTS.items():
        start_megatron(1)
        model = build_gpt(config, torch.float32)
        assert sum_partial_gradients(model).names == [], "nothing to sum on one rank"
        mean_loss(model, 1).backward()
        expected = whole_gradients(model)

        start_megatron(2)
        model = build_gpt(config, torch.float32)
        sums = sum_partial_gradients(model)
        for _ in range(2):
            (mean_loss(model, 1) / 2).backward()
        found[variant] = [expected, whole_gradients(model)]
        assert bool(sums.names) == config.qk_layernorm, sums.names
        sent = 2 * sum(p.numel() * 4 for p, facts in describe_model(model) if facts.query_or_key_norm)
        assert sums.ledger.total_bytes == sent  # fp32, 2 (T-1) / T = 1, two backward passes
        sums.remove()
        sums.remove()
        model.zero_grad()
        mean_loss(model, 1).backward()
        assert sums.ledger.total_bytes == sent, "a removed hook still sums"
        for parameter, facts in describe_model(model):
            if facts.query_or_key_norm:
                parts = [torch.empty_like(parameter) for _ in range(2)]
                dist.all_gather(parts, parameter.grad)
                assert not torch.equal(*parts), "without the sum the copies would drift apart"
    return found


def test_gradients_on_two_tensor_parallel_ranks_are_those_of_one() -> None:
    found = run_ranks(gradients_of_all_variants, 2)[0]
    for variant, (expected, cut) in found.items():
        assert cut.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(
                cut[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name, v=variant: f"{v}: {n}: {m}"
            )


def step_at_stage(stage: int, dtype: str) -> dict[str, Tensor]:
    """Weights after a step of plain SGD (lr 1) by two tensor-parallel ranks times two data-parallel ones."""
    import deepspeed

    config = VARIANTS["everything, recomputed"]
    start_megatron(2)
    model = build_gpt(config, torch.bfloat16 if dtype == "bf16" else torch.float32)
    before = sum_partial_gradients(model)
    before.remove()
    if stage != 2:
        sum_partial_gradients(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        mpu=MegatronMPU(),
        config={
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
            **({"bf16": {"enabled": True}} if dtype == "bf16" else {}),
        },
    )
    if stage == 2:
        sum_partial_gradients(engine.module)  # after DeepSpeed has put on its own hooks
    for micro_batch in range(2):
        engine.backward(mean_loss(engine, 10 * engine.mpu.get_data_parallel_rank() + micro_batch))
        engine.step()
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, enabled=stage == 3):
            weights[name] = gather(name, parameter, parameter.detach().float().clone())
    engine.destroy()
    return weights


def steps_at_all_stages() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    start_megatron(1)
    model = build_gpt(VARIANTS["everything, recomputed"], torch.float32)
    for seed in (0, 1, 10, 11):
        (mean_loss(model, seed) / 4).backward()
    expected = {name: (p - p.grad).detach() for name, p in model.named_parameters() if p.grad is not None}
    runs = [(stage, "fp32") for stage in (0, 1, 2, 3)] + [(1, "bf16")]
    return expected, {f"stage {stage}, {dtype}": step_at_stage(stage, dtype) for stage, dtype in runs}


@pytest.mark.deepspeed
def test_the_sums_come_before_deepspeeds_reductions_at_every_stage_with_accumulation_and_recomputation() -> None:
    expected, found = run_ranks(steps_at_all_stages, 4, timeout_s=200)[0]
    for run, weights in found.items():
        tolerance = 0.03 if run.endswith("bf16") else 1e-5
        for name, weight in expected.items():
            torch.testing.assert_close(
                weights[name], weight, rtol=1e-4, atol=tolerance, msg=lambda m, n=name, r=run: f"{r}: {n}: {m}"
            )


class NormAndMlp(nn.Module):
    """A norm, a column-parallel and a row-parallel layer, as in a transformer; sequence first, (s, b, h)."""

    def __init__(self, sequence_parallel: bool) -> None:
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.parallel_state import get_tensor_model_parallel_world_size
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        super().__init__()
        config = ModelParallelConfig(
            tensor_model_parallel_size=get_tensor_model_parallel_world_size(),
            sequence_parallel=sequence_parallel,
            use_cpu_initialization=True,
        )
        given: dict[str, Any] = {"config": config, "init_method": nn.init.xavier_normal_, "skip_bias_add": False}
        self.norm = nn.LayerNorm(8)
        for parameter in self.norm.parameters():
            parameter.sequence_parallel = sequence_parallel  # as Megatron's own norms mark theirs
        self.up = ColumnParallelLinear(8, 16, bias=True, gather_output=False, **given)
        self.down = RowParallelLinear(16, 8, bias=True, input_is_parallel=True, **given)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.nn.functional.gelu(self.up(self.norm(hidden))[0]))[0]


def gradients_with_sequence_parallelism() -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    generator = torch.Generator().manual_seed(1)
    hidden, target = torch.randn(2, 6, 3, 8, generator=generator)
    start_megatron(1)
    model = NormAndMlp(sequence_parallel=False)
    (model(hidden) * target).sum().backward()
    expected = whole_gradients(model)
    start_megatron(2)
    model = NormAndMlp(sequence_parallel=True)
    sums = sum_partial_gradients(model)
    mine = [scatter_to_sequence_parallel_region(tensor) for tensor in (hidden, target)]
    (model(mine[0]) * mine[1]).sum().backward()
    return expected, whole_gradients(model), sums.names


def test_sequence_parallel_layers_have_the_gradients_of_one_rank() -> None:
    expected, found, names = run_ranks(gradients_with_sequence_parallelism, 2)[0]
    assert names == ["norm.weight", "norm.bias", "down.bias"]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def averages() -> tuple[list[float], float]:
    start_megatron(2)
    weight = nn.Parameter(torch.ones(2))
    weight.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]
    model = nn.ParameterDict({"weight": weight})
    sums = sum_partial_gradients(model)
    (weight * float(dist.get_rank() + 1)).sum().backward()
    assert weight.grad is not None
    return weight.grad.tolist(), sums.ledger.by_kind["tensor_parallel"]


def test_gradients_that_megatron_averages_are_averaged() -> None:
    assert run_ranks(averages, 2)[0] == ([1.5, 1.5], 8)


def mpu_answers(tensor: int, pipe: int) -> dict[str, Any]:
    from megatron.core import parallel_state

    cpu.install()
    with pytest.raises(ValueError, match="initialize_model_parallel"):
        MegatronMPU()
    parallel_state.initialize_model_parallel(tensor, pipe)
    mpu = MegatronMPU()
    for refused in ("initialize_sequence_parallel", "get_sequence_parallel_world_size", "get_sequence_data_parallel"):
        assert not hasattr(mpu, refused)
    kinds = ("data_parallel", "model_parallel", "tensor_model_parallel", "pipeline_model_parallel")
    groups = {kind: dist.get_process_group_ranks(getattr(mpu, f"get_{kind}_group")()) for kind in kinds}
    for kind, ranks in groups.items():
        assert getattr(mpu, f"get_{kind}_world_size")() == len(ranks)
        assert ranks[getattr(mpu, f"get_{kind}_rank")()] == dist.get_rank()
    assert mpu.get_data_parallel_group_ranks() == groups["data_parallel"]
    assert mpu.get_data_parallel_src_rank() == groups["data_parallel"][0]
    parallel_state.destroy_model_parallel()
    for refused in ("context_parallel_size", "expert_model_parallel_size"):
        parallel_state.initialize_model_parallel(**{refused: 2})
        with pytest.raises(ValueError, match=f"{refused} = 2 is not supported: use 1"):
            MegatronMPU()
        parallel_state.destroy_model_parallel()
    return groups


def test_the_mpu_says_what_megatron_says_and_refuses_what_deepspeed_would_reduce_wrongly() -> None:
    found = run_ranks(mpu_answers, 4, 2, 2)
    assert found[1] == {
        "data_parallel": [1],
        "model_parallel": [0, 1, 2, 3],
        "tensor_model_parallel": [0, 1],
        "pipeline_model_parallel": [1, 3],
    }
    assert run_ranks(mpu_answers, 4, 2, 1)[2]["data_parallel"] == [0, 2]
