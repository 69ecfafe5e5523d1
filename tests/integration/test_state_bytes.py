"""Measured bytes of state per rank, for the parameter shapes of configs/model/gpt_16m.yaml."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lordo_ds
from tests.engines import make_engine, settings
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
SHARDS = (1, 2, 4)
# ZeRO-1 lays the parameters of a group end to end and cuts that in equal parts; ZeRO-3 cuts every parameter.
CASES = {"stage 1": (1, False), "stage 1, matrices in a group of their own": (1, True), "stage 3": (3, False)}
DIVIDED = ("exp_avg", "exp_avg_sq", "error", "anchor")

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]


class GptShapes(nn.Module):
    """The parameters of the 16M model; it computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        from pretrain.gpt import GptConfig

        config = GptConfig.from_yaml(ROOT / "configs" / "model" / "gpt_16m.yaml")
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        self.embedding = nn.Embedding(config.vocab_size, hidden)
        shapes = {"qkv": (3 * hidden, hidden), "proj": (hidden, hidden), "fc1": (2 * ffn, hidden), "fc2": (hidden, ffn)}
        for layer in range(config.num_layers):
            for norm in ("attention_norm", "mlp_norm"):
                self.register_parameter(f"{norm}_{layer}", nn.Parameter(torch.ones(hidden)))
            for name, shape in shapes.items():
                self.register_parameter(f"{name}_{layer}", nn.Parameter(torch.zeros(shape)))
        self.final_norm = nn.Parameter(torch.ones(hidden))

    def matrices(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.dim() == 2 and p is not self.embedding.weight]


def measure() -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """By case, on this rank: what status says, and what lies in the optimizer's state."""
    found = {}
    for case, (stage, apart) in CASES.items():
        model, given = GptShapes(), {}
        if apart:
            matrices = model.matrices()
            others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
            given["model_parameters"] = [{"params": matrices}, {"params": others}]
        params = {"rank": "1/8", "error_feedback": "fp32", "replica_size": "all"}
        engine = make_engine(settings(optimizer=params, zero_optimization={"stage": stage}), model, **given)
        found[case] = lordo_ds.status(engine)["state_bytes"], walked(engine.basic_optimizer)
        engine.destroy()
        dist.barrier()
    return found


def walked(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of every tensor in `optimizer.state`; moments of a parameter without a basis are dense."""
    kinds: Counter[str] = Counter()
    for by_parameter in optimizer.state.values():
        for state in by_parameter.values():
            dense = "basis" not in state
            for kind, value in state.items():
                if isinstance(value, Tensor):
                    kinds[f"dense_{kind}" if dense and kind.startswith("exp_avg") else kind] += value.nbytes
    return dict(kinds)


@functools.cache
def measured(shards: int) -> list[dict[str, tuple[dict[str, int], dict[str, int]]]]:
    return run_ranks(measure, shards)


def divided_bytes(shards: int, case: str) -> list[int]:
    """u + v + E + anchor on each rank."""
    return [sum(rank[case][0].get(kind, 0) for kind in DIVIDED) for rank in measured(shards)]


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("case", CASES)
def test_status_reports_what_lies_in_the_optimizers_state(case: str, shards: int) -> None:
    for status, state in (rank[case] for rank in measured(shards)):
        assert status == state


@pytest.mark.parametrize("case", CASES)
def test_one_shard_keeps_what_the_shapes_say(case: str) -> None:
    sides = [sorted(p.shape) for p in GptShapes().matrices()]
    ((status, _),) = (rank[case] for rank in measured(1))
    assert status["exp_avg"] == status["exp_avg_sq"] == 4 * sum(small // 8 * large for small, large in sides)
    assert status["basis"] == 4 * sum(small * (small // 8) for small, _ in sides)
    assert status["error"] == status["anchor"] == 4 * sum(small * large for small, large in sides)
    assert status["dense_exp_avg"] == status["dense_exp_avg_sq"] == 4 * (32768 * 256 + 21 * 256)


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("case", CASES)
def test_all_shards_together_keep_what_one_does_but_for_border_rows(case: str, shards: int) -> None:
    (total,) = divided_bytes(1, case)
    assert total <= sum(divided_bytes(shards, case)) <= 1.01 * total


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("case", [case for case in CASES if case != "stage 1"])
def test_each_shard_keeps_its_part(case: str, shards: int) -> None:
    """Where the shards' flat parts hold as much of the matrices: DeepSpeed, not we, cuts them."""
    (total,) = divided_bytes(1, case)
    for own in divided_bytes(shards, case):
        assert own == pytest.approx(total / shards, rel=0.1)


@pytest.mark.parametrize("shards", SHARDS)
def test_a_basis_is_kept_by_rows_where_the_rows_carry_it_and_whole_otherwise(shards: int) -> None:
    """Apart from the rest, because the number of shards does not divide it: at stage 3, fc2 has it on its rows."""
    model = GptShapes()
    own = {name: min(p.shape) ** 2 // 8 * 4 for name, p in model.named_parameters() if p.dim() == 2}
    on_rows = sum(size for name, size in own.items() if name.startswith("fc2"))
    on_columns = sum(size for name, size in own.items() if name.startswith(("qkv", "proj", "fc1")))
    for rank in measured(shards):
        assert rank["stage 3"][0]["basis"] == pytest.approx(on_rows / shards + on_columns, rel=0.01)
