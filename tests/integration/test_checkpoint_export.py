"""`lordo ckpt` on the reference GPT: shown, reshaped, and exported as plain weights and as a transformers model."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lordo_ds
from lordo_ds.checkpoint import open_run
from lordo_ds.checkpoint.tensor_file import TensorFile
from lordo_ds.cli.main import main
from tests.gpts import TIED, UNTIED, micro_batch
from tests.integration.test_checkpoint_mesh import MODELS as MESH_MODELS
from tests.integration.test_checkpoint_mesh import build, train_to
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.megatron,
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs Megatron on the CPU"),
]

MODELS = {
    "qwen3": TIED,
    "llama": dataclasses.replace(TIED, num_query_groups=None, qk_layernorm=False, tie_embeddings=False),
    "other": UNTIED,
}


def saved_and_asked(folder: str) -> dict[str, Tensor]:
    """Train each model for some steps; its logits on one batch."""
    MESH_MODELS.update(MODELS)
    found = {}
    for name, model in MODELS.items():
        engine = build((1, 1, 1, 1, "fp32"), name, seed=7)
        train_to(engine, 1, 4)
        engine.save_checkpoint(os.path.join(folder, name), client_state={"model": dataclasses.asdict(model)})
        lordo_ds.hook(engine).finish()  # type: ignore[union-attr]
        engine.save_checkpoint(os.path.join(folder, name), "synced", client_state={"model": dataclasses.asdict(model)})
        tokens = micro_batch(999, 0)["tokens"]
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        engine.eval()
        with torch.no_grad():
            found[name] = engine(tokens, positions, None).clone()
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("exported")
    return folder, run_ranks(saved_and_asked, 2, str(folder), timeout_s=200)[0]


def lordo(capsys: Any, *arguments: object) -> str:
    assert main([str(one) for one in arguments]) == 0, capsys.readouterr().err
    return str(capsys.readouterr().out)


def error_of(capsys: Any, *arguments: object) -> str:
    assert main([str(one) for one in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and not captured.out
    return str(captured.err)


def test_show_tells_what_a_checkpoint_holds(saved: Any, capsys: Any) -> None:
    text = lordo(capsys, "ckpt", "show", saved[0] / "qwen3", "--tag", "global_step4", "--parameters")
    assert "2 replicas x 1 shards, TP 1, PP 1, ZeRO stage 1, fp32" in text
    assert "4, 1 syncs, 1 steps after the last sync" in text and "client state  model" in text
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in text
    found = json.loads(lordo(capsys, "ckpt", "show", saved[0] / "qwen3", "--json"))
    assert found["replicas"] == 2 and found["synced"] and found["counters"][0]["attempted_steps"] == 4


def test_reshape_writes_what_any_layout_loads(saved: Any, tmp_path: Path, capsys: Any) -> None:
    source = saved[0] / "llama"
    arguments = ("ckpt", "reshape", source, tmp_path / "out", "--tag", "global_step4", "--replicas", 3, "--rank", 4)
    text = lordo(capsys, *arguments)
    assert "start from the mean of the weights of 2" in text and "rank 8 becomes 4" in text
    portable, run = open_run(tmp_path / "out"), open_run(source, "global_step4")
    assert portable.replicas == 3 and portable.settings["rank"] == 4
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    mean = (run.state(name, 0)["weight"].double() + run.state(name, 1)["weight"].double()) / 2
    for m in range(3):
        state = portable.state(name, m)
        assert torch.equal(state["weight"], mean.float()) and state["basis"].shape[1] == 4 == state["exp_avg"].shape[0]
    assert "exists and is not empty" in error_of(capsys, "ckpt", "reshape", source, tmp_path / "out")


def test_export_writes_plain_weights(saved: Any, tmp_path: Path, capsys: Any) -> None:
    source = saved[0] / "other"
    for dtype, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        arguments = ("--tag", "global_step4", "--replica", "1", "--dtype", dtype)
        lordo(capsys, "ckpt", "export", source, tmp_path / dtype, *arguments)
        file = TensorFile(tmp_path / dtype / "model.safetensors")
        run = open_run(source, "global_step4")
        assert set(file.entries) == set(run.parameters)
        for name in run.parameters:
            assert torch.equal(file.read(name), run.state(name, 1)["weight"].to(expected)), name
    text = lordo(capsys, "ckpt", "export", source, tmp_path / "mean", "--tag", "global_step4")
    assert "the weights are the mean of the replicas'" in text
    assert "holds replicas 0 to 1" in error_of(capsys, "ckpt", "export", source, tmp_path / "no", "--replica", "2")
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob("*.part"))


def test_models_that_transformers_does_not_have_are_refused(saved: Any, tmp_path: Path, capsys: Any) -> None:
    def refused(name: str, **changed: Any) -> str:
        file = tmp_path / "model.yaml"
        file.write_text(json.dumps({**dataclasses.asdict(MODELS[name]), **changed}))
        arguments = ("ckpt", "export", saved[0] / name, tmp_path / "no", "--format", "hf", "--model", file)
        return error_of(capsys, *arguments)

    assert "normalization = 'LayerNorm' is neither a Llama nor a Qwen3" in refused("other")
    assert "position_embedding = 'learned'" in refused("llama", position_embedding="learned")
    assert "the model file asks for" in refused("llama", ffn_hidden_size=64)
    assert "num_layers or tie_embeddings" in refused("qwen3", num_layers=3)
    assert "num_layers or tie_embeddings" in refused("qwen3", tie_embeddings=False)
    assert not (tmp_path / "no").exists()


@pytest.mark.hf
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_transformers_gives_the_same_logits(saved: Any, tmp_path: Path, capsys: Any, name: str) -> None:
    from transformers import AutoModelForCausalLM

    lordo(capsys, "ckpt", "export", saved[0] / name, tmp_path / "hf", "--format", "hf")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True, dtype=torch.float32)
    assert not any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__name__ == {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[name]
    with torch.no_grad():
        logits = model(micro_batch(999, 0)["tokens"]).logits
    expected = saved[1][name]
    assert float((logits - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


def test_the_command_runs_by_itself(saved: Any) -> None:
    command = [sys.executable, "-m", "lordo_ds.cli.main", "ckpt", "show", str(saved[0] / "llama"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{") :])["replicas"] == 2
