"""The model of `pretrain_gpt.py`: its YAML file, checked, and the Megatron-core GPT built from it."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ModelConfigError(ValueError):
    """A model file that cannot be used; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class GptConfig:
    """A decoder-only transformer; lengths in tokens, sizes in units."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    seq_length: int
    vocab_size: int
    ffn_hidden_size: int
    num_query_groups: int | None = None
    """Fewer than the heads is grouped-query attention; none is as many."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    position_embedding: Literal["rope", "learned"] = "rope"
    bias: bool = False
    tie_embeddings: bool = True
    qk_layernorm: bool = False
    dropout: float = 0.0
    init_std: float = 0.02
    recompute: bool = False
    """Recompute each layer's activations in the backward pass, to save memory."""

    @classmethod
    def from_yaml(cls, path: str | Path) -> GptConfig:
        """Read and check a model file.

        Raises:
            ModelConfigError: one line naming the file, the key, the value, the rule and the nearest key.
        """
        import yaml

        try:
            keys = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelConfigError(f"{path}: {error.strerror}; see configs/model/ for some that come") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ModelConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
        if not isinstance(keys, dict):
            raise ModelConfigError(f"{path}: must hold 'key: value' lines, as configs/model/tiny.yaml does")
        try:
            return cls.from_dict(keys)
        except ModelConfigError as error:
            raise ModelConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, keys: dict[Any, Any]) -> GptConfig:
        """Check the keys of a model file."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        hints = get_type_hints(cls)
        for key, value in keys.items():
            if key not in fields:
                near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(fields)}"
                raise ModelConfigError(f"unknown key {str(key)!r}: {hint}")
            _check_type(key, value, hints[key])
        for name, field in fields.items():
            if name not in keys and field.default is dataclasses.MISSING:
                raise ModelConfigError(f"key {name!r} is missing: it has no default")
        config = cls(**{key: float(value) if hints[key] is float else value for key, value in keys.items()})
        config._check_values()
        return config

    def _check_values(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise ModelConfigError(f"{field.name} {value}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ModelConfigError(f"dropout {self.dropout}: must be at least 0 and below 1")
        if self.init_std <= 0:
            raise ModelConfigError(f"init_std {self.init_std}: must be above 0")
        _check_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        if self.num_query_groups is not None:
            heads, groups = self.num_attention_heads, self.num_query_groups
            _check_multiple("num_attention_heads", heads, "num_query_groups", groups)
        if self.position_embedding == "rope" and self.hidden_size // self.num_attention_heads % 2:
            raise ModelConfigError(
                f"hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads}: "
                "rope needs an even quotient"
            )


def _check_type(key: str, value: Any, hint: Any) -> None:
    choices = get_args(hint)
    if choices and isinstance(choices[0], str):
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0) or choices
            rule = f"must be one of {', '.join(choices)} (nearest: {near[0]})"
            raise ModelConfigError(f"{key} {value!r}: {rule}")
        return
    kinds = choices or (hint,)
    # bool is an int in Python, and an int is a fine float in YAML; nothing else is converted.
    fits = type(value) in kinds or (float in kinds and type(value) is int)
    if not fits:
        names = " or ".join({"NoneType": "null"}.get(kind.__name__, kind.__name__) for kind in kinds)
        raise ModelConfigError(f"{key} {value!r}: must be {names}, not {type(value).__name__}")


def _check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        nearest = max(divisor, round(value / divisor) * divisor)
        raise ModelConfigError(f"{name} {value}: must be a multiple of {divisor_name} {divisor} (nearest: {nearest})")


def build_gpt(model: GptConfig, dtype: torch.dtype) -> torch.nn.Module:
    """A Megatron-core GPT of local layers (no TransformerEngine), its weights drawn from the CPU generator.

    The model-parallel groups must exist. Drawn on the CPU, the weights depend on the seed alone: not on the
    device, and not on the tensor-parallel size, since each rank draws the whole matrix and keeps its part.
    """
    from megatron.core.models.gpt import GPTModel

    return GPTModel(
        config=transformer_config(model, dtype),
        transformer_layer_spec=layer_spec(model),
        vocab_size=model.vocab_size,
        max_sequence_length=model.seq_length,
        position_embedding_type="rope" if model.position_embedding == "rope" else "learned_absolute",
        share_embeddings_and_output_weights=model.tie_embeddings,
    )


def layer_spec(model: GptConfig) -> Any:
    """Of which modules a transformer layer is made: Megatron's own, without TransformerEngine."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(normalization=model.normalization, qk_layernorm=model.qk_layernorm)


def transformer_config(model: GptConfig, dtype: torch.dtype) -> Any:
    """Megatron's `TransformerConfig`, on Megatron's tensor-parallel groups; to it there is one pipeline stage."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    activation = torch.nn.functional.silu if model.activation == "swiglu" else torch.nn.functional.gelu
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=activation,
        normalization=model.normalization,
        add_bias_linear=model.bias,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        init_method_std=model.init_std,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        # The fused kernels come with Apex and TransformerEngine, which this script does not need.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        **(recompute if model.recompute else {}),
    )


def loss_sums(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum over the batch's tokens of the next-token loss in nats, and how many tokens count.

    Args:
        batch: tokens, labels (int64) and loss_mask (float32), each (sequences, seq_length).
    """
    import torch

    tokens = batch["tokens"]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    # Without a mask Megatron applies the causal one.
    losses = model(tokens, positions, None, labels=batch["labels"])  # (sequences, seq_length)
    return masked_sums(losses, batch["loss_mask"])


def masked_sums(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses of the tokens that count, and how many they are."""
    return (losses.float() * loss_mask).sum(), loss_mask.sum()
