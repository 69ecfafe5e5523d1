"""The fragments of a model: whole layers in its order, every parameter once, the largest as small as can be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lordo_ds import LordoConfig
from lordo_ds.core.grouping import model_facts
from lordo_ds.core.model_fragments import balanced_runs, layer_of, model_fragments
from lordo_ds.core.schedule import fragment_due, sync_plan
from lordo_ds.errors import ConfigError


def config_of(fragments: int, interval: int = 64, delay: int = 0) -> LordoConfig:
    return LordoConfig.parse(
        {"sync_interval": interval, "streaming": {"fragments": fragments, "delay_steps": delay}}, path=""
    )


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("transformer.h.11.attn.c_proj.weight", "transformer.h.11"),
        ("model.layers.0.mlp.experts.3.up.weight", "model.layers.0"),
        ("0.weight", "0"),
        ("embedding.weight", "embedding"),
        ("final_norm.bias", "final_norm"),
        ("weight", "weight"),
    ],
)
def test_a_layer_is_named_up_to_its_first_number(name: str, layer: str) -> None:
    assert layer_of(name) == layer


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=9), data=st.data())
def test_runs_are_consecutive_none_is_empty_and_none_could_be_smaller(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    runs = balanced_runs(sizes, count)
    assert runs == sorted(runs) and set(runs) == set(range(count))
    largest = max(sum(size for size, run in zip(sizes, runs, strict=True) if run == one) for one in range(count))
    edges = [(0, *cut, len(sizes)) for cut in combinations(range(1, len(sizes)), count - 1)]
    assert largest == min(max(sum(sizes[a:b]) for a, b in pairwise(e)) for e in edges)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), interval=st.integers(1, 20))
def test_every_parameter_is_in_one_fragment_and_every_fragment_syncs_once_a_round(
    data: st.DataObject, interval: int
) -> None:
    layers = data.draw(st.integers(1, 8))
    names = [f"h.{i}.{part}" for i in range(layers) for part in ("weight", "bias")]
    config = config_of(data.draw(st.integers(1, min(layers, interval))), interval)
    where = model_fragments(config, [(name, data.draw(st.integers(1, 9))) for name in names])
    assert list(where) == names and all(where[f"h.{i}.weight"] == where[f"h.{i}.bias"] for i in range(layers))
    fragments = config.streaming.fragments
    for start in (0, interval, 5 * interval):
        due = [fragment_due(config, start + step) for step in range(1, interval + 1)]
        assert [fragment for fragment in due if fragment is not None] == list(range(fragments))
        assert due[-1] == fragments - 1


def test_a_copy_on_a_later_stage_is_where_the_first_one_is() -> None:
    sizes = [("embed.weight", 8), ("0.w", 4), ("1.w", 4), ("embed.weight", 8)]
    assert model_fragments(config_of(2), sizes) == {"embed.weight": 0, "0.w": 1, "1.w": 1}


def test_the_order_is_that_of_the_model() -> None:
    facts = model_facts(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))).values()
    assert [fact.position for fact in facts] == [0, 1, 2, 3]


def test_more_fragments_than_layers_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"streaming.fragments = 3 must be at most 2, .*nearest: 2"):
        model_fragments(config_of(3), [("h.0.a", 1), ("h.0.b", 1), ("h.1.a", 1)])


def test_fragments_take_turns_after_the_warm_up_and_moments_go_by_the_round() -> None:
    params = {"sync_interval": 6, "sync_warmup_steps": 2, "moment_sync_interval": 12, "streaming": {"fragments": 2}}
    config = LordoConfig.parse(params)
    plans = {step: sync_plan(config, step) for step in range(1, 13)}
    assert {step: plan.fragment for step, plan in plans.items() if plan.due} == {
        1: None, 2: None, 3: 0, 6: 1, 9: 0, 12: 1,
    }  # fmt: skip
    assert [step for step, plan in plans.items() if plan.average_exp_avg] == [1, 2, 9, 12]
    assert all(plans[step].refresh_basis for step in (3, 6, 9, 12))
