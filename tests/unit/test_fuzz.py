"""Whatever a user hands over is used as it stands or refused in one line: random settings, models and data files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from lordo_ds.config import LordoConfig
from lordo_ds.data.corpus import DataError
from lordo_ds.data.prepared import PreparedData, prepare
from lordo_ds.errors import ConfigError
from pretrain.gpt import GptConfig

WORDS = ("the", "of", "and", "to", "in", "is", "was", "for")
CONFIGS, MODELS, DATA_FILES = 1000, 500, 500
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 10**30, 0.0, -0.0, 0.5, 1.0, 1e308, -1e-300, float("nan"), float("inf")),
    *("", "1/8", "1/0", "0/1", "-1/2", "node", "all", "auto", "never", "fp32", "bf16", "int8", "paper", "x" * 500),
    *([], [0.9], [0.9, 0.99], ["a"], [[1]], {}, {"a": 1}, {"lr": 0.7}, {"include": ["("]}, {"exclude": [".*"]}),
    *("1e-3", "\n", "\u2028", "ranк", {"device": "cpu", "dtype": "fp64"}, {"fragments": 2, "delay_steps": 1}),
    *("int4", {"top_k": 8}, {"top_k": 8, "block": 4}),
)


def one_line(error: Exception) -> str:
    message = str(error)
    assert message and "\n" not in message and len(message) < 2000, repr(message)
    return message


def test_random_settings_are_parsed_or_refused_in_one_line() -> None:
    """What is accepted survives being written down and read again: nothing was silently replaced."""
    keys = [*LordoConfig.model_fields, "Rank", "sync_intervall", "", "rank ", "lr\n"]
    accepted = refused = 0
    for seed in range(CONFIGS):
        draw = random.Random(seed)
        settings: dict[Any, Any] = {draw.choice(keys): draw.choice(ODD_VALUES) for _ in range(draw.randint(1, 3))}
        try:
            config = LordoConfig.parse(settings)
        except ConfigError as error:
            refused += 1
            assert one_line(error).startswith("LoRDO: ")
            continue
        accepted += 1
        assert set(settings) <= set(LordoConfig.model_fields)
        assert LordoConfig.parse(settings) == config
    assert accepted > 10 and refused > CONFIGS // 4


def test_settings_that_are_no_object_are_refused() -> None:
    for value in ([], "lordo", 3, None, [("rank", 2)]):
        with pytest.raises(ConfigError):
            LordoConfig.parse(value)


def test_random_model_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    base = (Path(__file__).resolve().parents[2] / "configs" / "model" / "tiny.yaml").read_text()
    path, accepted, refused = tmp_path / "model.yaml", 0, 0
    for seed in range(MODELS):
        draw = random.Random(seed)
        text = base
        for _ in range(draw.randint(1, 3)):
            text = _mutated(text, draw)
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        try:
            model = GptConfig.from_yaml(path)
        except ValueError as error:
            one_line(error)
            refused += 1
        else:
            accepted += 1
            assert model.num_layers >= 1 and model.hidden_size % model.num_attention_heads == 0
    assert accepted > 20 and refused > MODELS // 4


def _mutated(text: str, draw: random.Random) -> str:
    lines = text.splitlines()
    at = draw.randrange(len(lines))
    kind = draw.randrange(6)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[draw.randrange(len(lines))])
    elif kind == 2:
        key = lines[at].split(":")[0]
        lines[at] = f"{key}: {json.dumps(draw.choice(ODD_VALUES))}"
    elif kind == 3:
        lines[at] = lines[at][: draw.randrange(len(lines[at]) + 1)]
    elif kind == 4:
        position = draw.randrange(len(lines[at]) + 1)
        lines[at] = lines[at][:position] + draw.choice("\t:{}[]&*!|>%@`'\"#\x00\u00e9-") + lines[at][position:]
    else:
        lines[at] = f"{draw.choice(['hiden_size', 'seq_length', 'rank', '? x', '- y'])}: {draw.randrange(-5, 300)}"
    return "\n".join(lines) or "x"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("fuzz")
    text = folder / "text.txt"
    words = random.Random(1)
    text.write_text("\n".join(" ".join(words.choices(WORDS, k=40)) for _ in range(300)))
    return prepare([text], vocab_size=512, cache=folder / "cache", say=lambda line: None)


def test_damaged_data_files_are_refused_by_name(prepared: PreparedData, tmp_path: Path) -> None:
    """Truncated, lengthened or with a bit changed: the index, the facts, the tokenizer; the tokens by their size."""
    from lordo_ds.data.prepared import _open

    names = ("tokens.idx", "info.json", "tokenizer.model", "tokens.bin")
    intact = {name: (prepared.folder / name).read_bytes() for name in names}
    folder = tmp_path / "data"
    shutil.copytree(prepared.folder, folder)
    assert _open(folder, "key").tokens == prepared.tokens
    refused = 0
    for seed in range(DATA_FILES):
        draw = random.Random(seed)
        name = draw.choice(names)
        data = bytearray(intact[name])
        kind = draw.randrange(3)
        if kind == 0:
            del data[draw.randrange(len(data)) :]
        elif kind == 1:
            data += bytes(draw.randrange(1, 40))
        else:
            at = draw.randrange(len(data))
            data[at] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(data)
        try:
            opened = _open(folder, "key")
        except DataError as error:
            assert str(folder) in one_line(error) and "delete" in str(error)
            refused += 1
        else:
            # A changed token or piece is another text, of the same size; everything else must be noticed.
            assert name != "tokens.idx" and (kind > 0 or data == intact[name]), name
            assert opened.tokens == prepared.tokens
        (folder / name).write_bytes(intact[name])
    assert refused > DATA_FILES // 3
