"""Model files: what is wrong is said in one line, with the file, the key, the rule and the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

from pretrain.gpt import GptConfig, ModelConfigError  # noqa: E402  (launchers/ is a folder of scripts, not a package)

TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "seq_length": 16,
    "vocab_size": 512,
}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hiden_size": 64}, "unknown key 'hiden_size': did you mean 'hidden_size'?"),
        ({"wings": 2}, "unknown key 'wings': the keys are num_layers, "),
        ({"num_layers": "two"}, "num_layers 'two': must be int, not str"),
        ({"num_layers": 2.0}, "num_layers 2.0: must be int, not float"),
        ({"num_layers": True}, "num_layers True: must be int, not bool"),
        ({"bias": 1}, "bias 1: must be bool, not int"),
        ({"num_query_groups": "all"}, "num_query_groups 'all': must be int or null, not str"),
        ({"activation": "swigloo"}, "activation 'swigloo': must be one of swiglu, gelu (nearest: swiglu)"),
        ({"normalization": None}, "normalization None: must be one of RMSNorm, LayerNorm"),
        ({"num_layers": 0}, "num_layers 0: must be at least 1"),
        ({"dropout": 1}, "dropout 1.0: must be at least 0 and below 1"),
        ({"init_std": 0.0}, "init_std 0.0: must be above 0"),
        ({"hidden_size": 34}, "hidden_size 34: must be a multiple of num_attention_heads 4 (nearest: 32)"),
        (
            {"num_query_groups": 3},
            "num_attention_heads 4: must be a multiple of num_query_groups 3 (nearest: 3)",
        ),
        ({"hidden_size": 12}, "rope needs an even quotient"),
    ],
)
def test_a_wrong_key_or_value_is_told_with_its_rule(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    import yaml

    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    with pytest.raises(ModelConfigError) as caught:
        GptConfig.from_yaml(path)
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: [1\n", "not YAML"),
        ("- 1\n", "must hold 'key: value' lines"),
        ("", "must hold 'key: value' lines"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(content)
    with pytest.raises(ModelConfigError, match=told) as caught:
        GptConfig.from_yaml(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_missing_key_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"nowhere.yaml: No such file .*configs/model/"):
        GptConfig.from_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ModelConfigError, match="key 'vocab_size' is missing"):
        GptConfig.from_dict({key: value for key, value in TINY.items() if key != "vocab_size"})


def test_an_int_is_a_fine_float_and_defaults_apply() -> None:
    config = GptConfig.from_dict({**TINY, "dropout": 0})
    assert (config.dropout, config.activation, config.tie_embeddings) == (0, "swiglu", True)


def parameters_of(config: GptConfig) -> int:
    """Weights of a bias-free, tied, gated model without grouped queries."""
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.ffn_hidden_size + 2 * config.hidden_size
    return config.num_layers * layer + config.hidden_size + config.vocab_size * config.hidden_size


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 1.4),
        ("gpt_16m", 16),
        ("gpt_125m", 125),
        ("gpt_350m", 350),
        ("gpt_720m", 720),
        ("gpt_1_3b", 1300),
    ],
)
def test_every_model_that_comes_is_valid_and_as_large_as_its_name(name: str, millions: float) -> None:
    config = GptConfig.from_yaml(ROOT / "configs" / "model" / f"{name}.yaml")
    assert not config.bias and config.tie_embeddings and config.num_query_groups is None
    assert config.activation == "swiglu"
    assert parameters_of(config) / 1e6 == pytest.approx(millions, rel=0.03)
