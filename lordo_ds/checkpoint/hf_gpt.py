"""The reference GPT (Megatron-core) as transformers' LlamaForCausalLM, or Qwen3ForCausalLM with q and k norms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lordo_ds.checkpoint.run import SavedParameter
from lordo_ds.errors import CheckpointError

# Of Megatron-core's TransformerConfig and GPTModel, which the training script leaves as they are.
_EPSILON, _ROPE_BASE = 1e-5, 10000.0
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size", "ffn_hidden_size")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_PLAIN = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_OF_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_QKV, _FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"


@dataclass(frozen=True)
class HuggingFaceGpt:
    """Names, shapes and configuration of one model on the other side."""

    keys: Mapping[str, Any]
    names: list[str]

    @classmethod
    def of(cls, keys: Mapping[str, Any], parameters: Mapping[str, SavedParameter]) -> HuggingFaceGpt:
        """Check that transformers has the model and that the weights are its.

        Args:
            keys: those of the model file.

        Raises:
            CheckpointError: it has not, or they are not.
        """
        for key in _NEEDED:
            if type(keys.get(key)) is not int or keys[key] < 1:
                raise CheckpointError(
                    f"LoRDO: the model file's {key} is {keys.get(key)!r}: must be a whole number >= 1"
                )
        for key, needed, default in (
            ("normalization", "RMSNorm", "RMSNorm"),
            ("position_embedding", "rope", "rope"),
            ("activation", "swiglu", "swiglu"),
            ("bias", False, False),
        ):
            if keys.get(key, default) != needed:
                raise CheckpointError(
                    f"LoRDO: a model with {key} = {keys[key]!r} is neither a Llama nor a Qwen3, which have {needed!r}: "
                    "use --format safetensors"
                )
        gpt = cls(keys, [])
        for name, parameter in parameters.items():
            expected = gpt._shape(name)
            if expected != parameter.shape:
                wanted = "no such parameter" if expected is None else str(expected)
                raise CheckpointError(
                    f"LoRDO: {name} is {parameter.shape}, and the model file asks for {wanted}: give the file that the "
                    "model was trained with"
                )
        layers = {int(match[1]) for match in map(_LAYER.fullmatch, parameters) if match}
        if layers != set(range(keys["num_layers"])) or ("output_layer.weight" in parameters) == gpt.tied:
            raise CheckpointError(
                "LoRDO: num_layers or tie_embeddings of the model file are not those of the checkpoint: give the file "
                "that the model was trained with"
            )
        gpt.names.extend(new for name in parameters for new in gpt._new_names(name))
        return gpt

    @property
    def tied(self) -> bool:
        return bool(self.keys.get("tie_embeddings", True))

    @property
    def _groups(self) -> int:
        return int(self.keys.get("num_query_groups") or self.keys["num_attention_heads"])

    @property
    def _head(self) -> int:
        return int(self.keys["hidden_size"]) // int(self.keys["num_attention_heads"])

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """Of a parameter of the reference model."""
        hidden, ffn, vocabulary = (self.keys[key] for key in ("hidden_size", "ffn_hidden_size", "vocab_size"))
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            return vocabulary, hidden
        match = _LAYER.fullmatch(name)
        part = match[2] if match else name
        heads = self._head * self.keys["num_attention_heads"]
        if part in ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"):
            return (self._head,) if self.keys.get("qk_layernorm", False) else None
        return {
            "decoder.final_layernorm.weight": (hidden,),
            "input_layernorm.weight": (hidden,),
            "pre_mlp_layernorm.weight": (hidden,),
            "self_attention.linear_proj.weight": (hidden, heads),
            _QKV: (heads + 2 * self._groups * self._head, hidden),
            _FC1: (2 * ffn, hidden),
            "mlp.linear_fc2.weight": (hidden, ffn),
        }.get(part)

    def _new_names(self, name: str) -> list[str]:
        if name in _PLAIN:
            return [_PLAIN[name]]
        match = _LAYER.fullmatch(name)
        if match is None:
            return []
        prefix, part = f"model.layers.{match[1]}.", match[2]
        if part == _QKV:
            return [f"{prefix}self_attn.{one}_proj.weight" for one in "qkv"]
        if part == _FC1:
            return [f"{prefix}mlp.{one}_proj.weight" for one in ("gate", "up")]
        return [prefix + _OF_LAYER[part]]

    def convert(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """One parameter of the reference model as those that it becomes; buffers become none."""
        names = self._new_names(name)
        if len(names) == 3:
            yield from zip(names, self._queries_keys_values(weight), strict=True)
        elif len(names) == 2:  # [gate; up]
            yield from zip(names, weight.chunk(2), strict=True)
        elif names:
            yield names[0], weight

    def _queries_keys_values(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Fused group by group: the group's queries, then its key, then its value."""
        per_group = self.keys["num_attention_heads"] // self._groups
        blocks = weight.view(self._groups, per_group + 2, self._head, -1)
        parts = blocks.split([per_group, 1, 1], dim=1)
        return tuple(part.reshape(-1, weight.shape[1]) for part in parts)

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """`config.json`."""
        keys, qwen = self.keys, bool(self.keys.get("qk_layernorm", False))
        return {
            "architectures": ["Qwen3ForCausalLM" if qwen else "LlamaForCausalLM"],
            "model_type": "qwen3" if qwen else "llama",
            "vocab_size": keys["vocab_size"],
            "hidden_size": keys["hidden_size"],
            "intermediate_size": keys["ffn_hidden_size"],
            "num_hidden_layers": keys["num_layers"],
            "num_attention_heads": keys["num_attention_heads"],
            "num_key_value_heads": self._groups,
            "head_dim": self._head,
            "max_position_embeddings": keys["seq_length"],
            "rms_norm_eps": _EPSILON,
            "rope_theta": _ROPE_BASE,
            "hidden_act": "silu",
            "attention_bias": False,
            **({} if qwen else {"mlp_bias": False}),
            "initializer_range": keys.get("init_std", 0.02),
            "tie_word_embeddings": self.tied,
            "use_cache": True,
            "dtype": str(dtype).removeprefix("torch."),
            # The reference model knows no special tokens.
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
