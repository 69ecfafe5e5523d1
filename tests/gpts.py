"""Small GPTs of the reference script in Megatron's groups, for tests of its parallel layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_patches import cpu
from megatron_patches.gradients import sum_partial_gradients
from megatron_patches.mpu import MegatronMPU
from pretrain.gpt import GptConfig, build_gpt

TIED = GptConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    qk_layernorm=True,
    ffn_hidden_size=48,
    seq_length=16,
    vocab_size=64,
    init_std=0.1,
)
UNTIED = replace(
    TIED,
    num_query_groups=4,
    qk_layernorm=False,
    normalization="LayerNorm",
    position_embedding="learned",
    activation="gelu",
    bias=True,
    tie_embeddings=False,
)


def start_megatron(tensor: int = 1, pipe: int = 1, seed: int = 7) -> None:
    """Megatron's groups and seeds on the CPU; torch.distributed is initialised."""
    from megatron.core import parallel_state
    from megatron.core import tensor_parallel as tp

    cpu.install()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, pipe)
    tp.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)


def build_module(model: GptConfig, dtype: torch.dtype, pipe: int) -> tuple[Any, Any]:
    """The model for `deepspeed.initialize`, and the mpu that goes with it."""
    if pipe > 1:
        from pretrain.gpt_pipe import GPTModelPipe

        module, mpu = GPTModelPipe(model, dtype), None
    else:
        module, mpu = build_gpt(model, dtype), MegatronMPU()
    sum_partial_gradients(module)
    return module, mpu


def micro_batch(step: int, number: int) -> dict[str, Tensor]:
    """The samples of one micro-batch for `TIED` and `UNTIED`, numbered over all replicas."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    tokens = torch.randint(0, TIED.vocab_size, (2, TIED.seq_length + 1), generator=generator)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:].contiguous(), "loss_mask": torch.ones(2, TIED.seq_length)}
