"""Parameters cut across tensor-parallel ranks and put together again, and what Megatron says of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megatron_patches.params import MegatronParameter, describe, describe_model, shard_of, whole
from pretrain.gpt import GptConfig, build_gpt
from tests.ranks import run_ranks


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 1]), st.booleans()
)
def test_cutting_and_joining_are_inverses(
    count: int, stride: int, block: int, other: int, dim: int, vector: bool
) -> None:
    length = count * stride * block
    if vector:
        shape: tuple[int, ...] = (length,)
        dim = 0
    else:
        shape = (length, other) if dim == 0 else (other, length)
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    shards = [shard_of(tensor, dim, stride, index, count) for index in range(count)]
    assert len({shard.shape for shard in shards}) == 1
    assert torch.equal(torch.cat([shard.flatten() for shard in shards]).sort().values, tensor.flatten())
    assert torch.equal(whole(shards, dim, stride), tensor)


def test_a_gated_matrix_is_the_whole_gate_over_the_whole_of_up() -> None:
    gate, up = torch.arange(4), torch.arange(10, 14)
    shards = [torch.cat([gate[:2], up[:2]]), torch.cat([gate[2:], up[2:]])]
    assert whole(shards, 0, 2).tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert shard_of(whole(shards, 0, 2), 0, 2, 1, 2).tolist() == [2, 3, 12, 13]


def test_a_parameter_that_is_not_cut_is_the_same_on_all_ranks() -> None:
    norm = torch.ones(3)
    assert whole([norm, norm], None) is norm
    assert shard_of(norm, None, 1, 1, 2) is norm


def test_an_odd_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dimension 0 of \(6, 2\) must be a multiple of 4 .* 2 tensor-parallel"):
        shard_of(torch.zeros(6, 2), 0, 2, 0, 2)
    with pytest.raises(ValueError, match="cannot be cut into 2 blocks"):
        whole([torch.zeros(1, 2)], 0, 2)


def test_an_ordinary_parameter_is_whole_everywhere() -> None:
    facts = describe("layer.weight", nn.Linear(2, 3).weight)
    assert facts == MegatronParameter("layer.weight", (3, 2), None)
    assert not (facts.fused_qkv or facts.gated or facts.expert or facts.tied or facts.query_or_key_norm)


def descriptions() -> dict[str, MegatronParameter]:
    from megatron.core import parallel_state
    from megatron.core import tensor_parallel as tp

    from megatron_patches import cpu

    cpu.install()
    parallel_state.initialize_model_parallel(1)
    tp.model_parallel_cuda_manual_seed(1)
    config = GptConfig(1, 32, 4, 16, 64, 48, num_query_groups=2, qk_layernorm=True, tie_embeddings=False)
    model = build_gpt(replace(config, bias=True), torch.float32)
    return {facts.name: facts for _, facts in describe_model(model)}


@pytest.mark.megatron
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Megatron on the CPU")
def test_what_megatron_says_of_each_parameter_at_a_tensor_parallel_size_of_one() -> None:
    found = run_ranks(descriptions, 1)[0]
    attention, mlp = "decoder.layers.0.self_attention", "decoder.layers.0.mlp"
    cuts = {name: (facts.dim, facts.stride) for name, facts in found.items() if facts.dim is not None}
    assert cuts == {
        "embedding.word_embeddings.weight": (0, 1),
        f"{attention}.linear_proj.weight": (1, 1),
        f"{attention}.linear_qkv.weight": (0, 1),
        f"{attention}.linear_qkv.bias": (0, 1),
        f"{mlp}.linear_fc1.weight": (0, 2),
        f"{mlp}.linear_fc1.bias": (0, 2),
        f"{mlp}.linear_fc2.weight": (1, 1),
        "output_layer.weight": (0, 1),
    }
    kinds = {
        "fused_qkv": {f"{attention}.linear_qkv.weight", f"{attention}.linear_qkv.bias"},
        "gated": {f"{mlp}.linear_fc1.weight", f"{mlp}.linear_fc1.bias"},
        "query_or_key_norm": {f"{attention}.q_layernorm.weight", f"{attention}.k_layernorm.weight"},
        "embedding_or_output": {"embedding.word_embeddings.weight", "output_layer.weight"},
        "expert": set(),
        "sequence_parallel": set(),
    }
    for kind, names in kinds.items():
        assert {name for name, facts in found.items() if getattr(facts, kind)} == names, kind
    assert found[f"{attention}.linear_qkv.weight"].shape == (4 * 8 + 2 * 2 * 8, 32)
