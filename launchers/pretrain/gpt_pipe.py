"""The same GPT cut into pipeline stages: a DeepSpeed `PipelineModule` of Megatron-core layers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import transformer_block
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from pretrain.gpt import GptConfig, layer_spec, masked_sums, transformer_config

TIED = "word_embeddings"
FIRST_LAYER = 2  # after the word embedding and the positions


class WordEmbeddingPipe(nn.Module):
    """Nothing but the word embedding: of a tied module DeepSpeed takes every parameter to be there twice."""

    def __init__(self, model: GptConfig, config: Any) -> None:
        super().__init__()
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            num_embeddings=model.vocab_size,
            embedding_dim=model.hidden_size,
            init_method=config.embedding_init_method,
            config=config,
        )
        _mark_embedding(self.word_embeddings.weight)

    def forward(self, tokens: Tensor) -> Tensor:  # (b, s) -> (b, s, h)
        return self.word_embeddings(tokens)


class PositionsPipe(nn.Module):
    """Learned positions, if the model has them, the transposition to sequence first, and dropout."""

    def __init__(self, model: GptConfig, config: Any) -> None:
        super().__init__()
        if model.position_embedding == "learned":
            self.position_embeddings = nn.Embedding(model.seq_length, model.hidden_size)
            config.embedding_init_method(self.position_embeddings.weight)
        else:
            self.position_embeddings = None
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, embedded: Tensor) -> Tensor:  # (b, s, h) -> (s, b, h)
        if self.position_embeddings is not None:
            positions = torch.arange(embedded.shape[1], device=embedded.device)
            embedded = embedded + self.position_embeddings(positions.expand(embedded.shape[:2]))
        return self.dropout(embedded.transpose(0, 1).contiguous())


class ParallelTransformerLayerPipe(nn.Module):
    """One transformer layer. By this name DeepSpeed knows which layers of a `GPTModelPipe` may be recomputed."""

    def __init__(self, model: GptConfig, config: Any, number: int, rotary: RotaryEmbedding | None) -> None:
        super().__init__()
        self.layer = build_module(layer_spec(model), config=config, layer_number=number)
        self._rotary = (rotary,)  # shared by all layers, so no submodule of one

    def forward(self, hidden: Tensor) -> Tensor:  # (s, b, h)
        (rotary,) = self._rotary
        angles = None if rotary is None else rotary(hidden.shape[0])
        # Without a mask Megatron applies the causal one.
        return self.layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles)[0]


class FinalNormPipe(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm = transformer_block.LayerNormImpl(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)


class OutputPipe(nn.Module):
    """A head of its own: (s, b, h) -> logits (s, b, this rank's part of the vocabulary)."""

    def __init__(self, model: GptConfig, config: Any) -> None:
        super().__init__()
        self.output_layer = _output_layer(model, config, own_weight=True)
        _mark_embedding(self.output_layer.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output_layer(hidden)[0]


def _output_layer(model: GptConfig, config: Any, own_weight: bool) -> tensor_parallel.ColumnParallelLinear:
    return tensor_parallel.ColumnParallelLinear(
        model.hidden_size,
        model.vocab_size,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        skip_weight_param_allocation=not own_weight,
    )


def _mark_embedding(weight: nn.Parameter) -> None:
    weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]


def _recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Megatron's recomputation, which repeats the dropout of every tensor-parallel rank; DeepSpeed's knows one."""
    return tensor_parallel.checkpoint(function, False, *inputs)


class GPTModelPipe(PipelineModule):
    """The model of `build_gpt` for DeepSpeed's pipeline engine, with the same initial weights for the same seed.

    Megatron's groups must exist; their mesh is the one DeepSpeed gets: pipe x data x tensor. Between stages only
    hidden states travel, (s, b, h). Micro-batches are (tokens, (labels, loss_mask)), each (b, s). The loss of a
    micro-batch is its mean over the tokens that count. The transformer layers are divided evenly.

    Attributes:
        evaluated: on the last stage, of every micro-batch that was run in evaluation mode, the sum of the losses
            and the number of tokens; whoever evaluates empties it.
    """

    def __init__(self, model: GptConfig, dtype: torch.dtype) -> None:
        config = transformer_config(model, dtype)
        specs = _layers(model, config)
        topology = PipeModelDataParallelTopology(
            num_pp=parallel_state.get_pipeline_model_parallel_world_size(),
            num_mp=parallel_state.get_tensor_model_parallel_world_size(),
            num_dp=parallel_state.get_data_parallel_world_size(),
        )
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it does
            super().__init__(
                layers=specs,
                topology=topology,
                loss_fn=self.mean_loss,
                partition_method="type:^ParallelTransformerLayerPipe$",
                seed_layers=True,
                seed_fn=_DrawnInOrder(specs),
                base_seed=0,
                activation_checkpoint_interval=1 if model.recompute else 0,
                activation_checkpoint_func=_recomputed,
            )
        self.seed_layers = False  # else every forward pass would draw the weights once more
        self.seed_fn = None
        self.evaluated: list[Tensor] = []

    def name_in_one_piece(self, name: str) -> str:
        """The name that `GPTModel` gives a parameter, which here is numbered by its layer."""
        number, _, rest = name.removeprefix("tied_modules.").partition(".")
        if rest.startswith(("word_embeddings.", "position_embeddings.")):
            return f"embedding.{rest}"
        if rest.startswith("layer."):
            return f"decoder.layers.{int(number) - FIRST_LAYER}.{rest.removeprefix('layer.')}"
        return rest if rest.startswith("output_layer.") else f"decoder.final_layernorm.{rest.removeprefix('norm.')}"

    def mean_loss(self, logits: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        """Mean next-token loss of a micro-batch in nats; in evaluation mode its sums go to `evaluated`."""
        targets, loss_mask = labels
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits, targets.transpose(0, 1).contiguous())
        total, count = masked_sums(losses.transpose(0, 1).contiguous(), loss_mask)
        if not self.training:
            self.evaluated.append(torch.stack([total, count]))
        return total / count.clamp(min=1)  # an evaluation may hold micro-batches without a token that counts


def _layers(model: GptConfig, config: Any) -> list[LayerSpec]:
    """In the order in which `GPTModel` makes them, for they draw their weights from one generator."""
    rotary = None
    if model.position_embedding == "rope":
        rotary = RotaryEmbedding(config.kv_channels, rotary_percent=1.0, use_cpu_initialization=True)
    embedding = partial(TiedLayerSpec, TIED) if model.tie_embeddings else LayerSpec
    weight = {"tied_weight_attr": "word_embeddings.weight"} if model.tie_embeddings else {}
    layers = [
        embedding(WordEmbeddingPipe, model, config, **weight),
        LayerSpec(PositionsPipe, model, config),
        *(LayerSpec(ParallelTransformerLayerPipe, model, config, i + 1, rotary) for i in range(model.num_layers)),
        LayerSpec(FinalNormPipe, config),
    ]
    if not model.tie_embeddings:
        return [*layers, LayerSpec(OutputPipe, model, config)]
    head = _output_layer(model, config, own_weight=False)

    def tied_logits(embedding: WordEmbeddingPipe, hidden: Tensor) -> Tensor:
        return head(hidden, weight=embedding.word_embeddings.weight)[0]

    return [*layers, embedding(WordEmbeddingPipe, model, config, forward_fn=tied_logits, **weight)]


class _DrawnInOrder:
    """A `seed_fn` that sets the CPU's generator to where it stands when a model in one piece reaches a layer.

    The layers of earlier stages are built and dropped, one at a time; the generator cannot be wound on otherwise.
    """

    def __init__(self, specs: list[LayerSpec]) -> None:
        self._specs = specs
        self._next = 0

    def __call__(self, layer: int) -> None:
        for spec in self._specs[self._next : layer]:
            spec.build()
        self._next = layer + 1
