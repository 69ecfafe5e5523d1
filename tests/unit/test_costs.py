"""What a run costs, by hand and against what is really kept. Plain numbers, no processes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lordo_ds import costs
from lordo_ds.comm.inside import InsideComm, InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import whole
from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.core.schedule import SyncPlan, final_plan, sync_plan
from lordo_ds.costs import Holding, Links
from lordo_ds.replica.fragment import Fragment
from lordo_ds.start_table import border_copy_bytes, state_bytes
from lordo_ds.sync.outer_sync import OuterSync

S, L, R = 6, 10, 2
MATRIX = ParameterPlan("w", (S, L), True, "", side="rows", rank=R)
BIAS = ParameterPlan("b", (7,), False, "")
HOLDINGS = [Holding(MATRIX, whole((S, L))), Holding(BIAS, whole((7,)))]
MATRIX_ALONE, DENSE_ALONE = HOLDINGS[:1], HOLDINGS[1:]


def config(**settings: Any) -> LordoConfig:
    return LordoConfig.parse({"lr": 1e-3, "rank": R, "sync_interval": 4, **settings})


def sync_bytes(settings: LordoConfig, plan: SyncPlan, holdings: list[Holding], links: Links, **more: int) -> int:
    return costs.sync_bytes(settings, plan, [holdings], links, **{"header_fields": 0, "trailer_fields": 0, **more})


# -- what crosses replicas ---------------------------------------------------------------------------


def test_two_replicas_send_a_sum_once_and_the_twins_of_one_divide_it() -> None:
    assert Links(2).sum_bytes(60, 4) == 240
    assert Links(4).sum_bytes(60, 4) == 240 * 2 * 3 // 4
    assert Links(2, twins=8).sum_bytes(60, 4) == 8 * 4  # 60 / 8, padded to whole elements
    assert Links(3).fields_bytes(5) == 5 * 8 * 2
    assert Links(1).sum_bytes(60, 4) == Links(1).fields_bytes(5) == 0


def test_a_sync_sends_d_the_moments_and_the_numbers_of_header_and_trailer() -> None:
    moments = S * L + 2 * R * L
    plain = config()
    sent = sync_bytes(plain, sync_plan(plain, 4), MATRIX_ALONE, Links(2))
    assert sent == 4 * moments + 8  # of a header of nothing else, the matrix's step
    both = sync_bytes(plain, sync_plan(plain, 4), HOLDINGS, Links(2), header_fields=10, trailer_fields=4)
    assert both == 4 * (moments + 7) + 8 * (10 + 2 + 4)
    rows = sync_bytes(plain, sync_plan(plain, 4), MATRIX_ALONE, Links(2), row_numbers=3 * 2)
    assert rows == sent + 6 * 8
    assert sync_bytes(plain, sync_plan(plain, 4), HOLDINGS, Links(1), header_fields=10, trailer_fields=4) == 0


@pytest.mark.parametrize(
    ("settings", "step", "elements", "narrow"),
    [
        ({"pseudo_gradient_dtype": "bf16"}, 4, 2 * R * L, S * L),
        ({"qh_mode": "factored"}, 4, S * L + 2 * R * L + S + L, 0),
        ({"moment_sync_interval": [8, 4]}, 4, S * L + R * L, 0),
        ({"moment_sync_interval": [8, 4], "qh_mode": "factored"}, 4, S * L + R * L + S + L, 0),
        ({"moment_sync_interval": [4, 8], "qh_mode": "factored"}, 4, S * L + R * L, 0),
        ({"moment_sync_interval": "never"}, 4, S * L, 0),
        ({"projection": "local"}, 4, S * L, 0),
        ({"basis_source": "gradient", "qh_mode": "none"}, 4, 2 * S * L + 2 * R * L, 0),
        ({"basis_source": "gradient", "qh_mode": "none", "sync_warmup_steps": 3}, 3, S * L + 2 * R * L, 0),
        ({"basis_source": "gradient", "qh_mode": "none", "projection": "local"}, 4, S * L, 0),
        ({"outer": {"momentum": 0.7}}, 4, S * L + 2 * R * L, 0),
    ],
)
def test_each_setting_sends_what_it_says(settings: dict[str, Any], step: int, elements: int, narrow: int) -> None:
    chosen = config(**settings)
    assert sync_bytes(chosen, sync_plan(chosen, step), MATRIX_ALONE, Links(2)) == 4 * elements + 2 * narrow + 8


def test_dense_moments_travel_only_where_that_is_asked_for() -> None:
    for asked, elements in ((False, 7), (True, 3 * 7)):
        chosen = config(average_dense_moments=asked)
        assert sync_bytes(chosen, sync_plan(chosen, 4), DENSE_ALONE, Links(2)) == 4 * elements + 8


def test_a_final_sync_has_no_gradient_to_send_and_a_matrix_without_a_basis_none_either() -> None:
    chosen = config(basis_source="gradient", qh_mode="none")
    assert sync_bytes(chosen, final_plan(chosen, 5), MATRIX_ALONE, Links(2)) == 4 * S * L + 8  # nor moments, at 5
    without = 4 * (S * L + 2 * R * L) + 8
    assert sync_bytes(chosen, final_plan(chosen, 4), MATRIX_ALONE, Links(2)) == without
    waiting = [Holding(MATRIX, whole((S, L)), has_basis=False)]
    assert sync_bytes(chosen, sync_plan(chosen, 4), waiting, Links(2)) == without


def test_first_bases_cost_a_gradient_once_and_a_flag_each() -> None:
    assert costs.first_basis_bytes(config(), MATRIX_ALONE * 2, Links(2), flags=4) == 2 * 4 * S * L + 8 * (4 + 2)
    assert costs.first_basis_bytes(config(projection="local"), MATRIX_ALONE, Links(2), flags=4) == 0
    assert costs.first_basis_bytes(config(), MATRIX_ALONE, Links(1), flags=4) == 0


@given(st.integers(2, 64), st.integers(0, 400), st.integers(1, 2), st.integers(2, 8), st.integers(1, 9))
def test_bytes_scale_as_the_readme_says(s: int, more: int, rank: int, replicas: int, k: int) -> None:
    """s l + 2 r l in K steps, where AdamW sends K s l; the same factor of all replicas' share before both."""
    plan = ParameterPlan("w", (s, s + more), True, "", side="rows", rank=rank)
    chosen = config(rank=rank, sync_interval=k)
    held = [Holding(plan, whole(plan.shape))]
    sent = sync_bytes(chosen, sync_plan(chosen, k), held, Links(replicas)) - Links(replicas).fields_bytes(1)
    elements = s * (s + more) + 2 * rank * (s + more)
    assert abs(sent - 4 * elements * 2 * (replicas - 1) / replicas) < 3  # three sums, each rounded down
    others = costs.other_methods_bytes(chosen, [plan], replicas, 1, width=4)
    assert others["adamw_ddp"] == 4 * plan.numel * 2 * (replicas - 1) // replicas
    assert others["diloco"] * k == pytest.approx(others["adamw_ddp"])


def test_the_other_methods_send_gradients_coordinates_or_weights() -> None:
    plans, chosen = [MATRIX, BIAS], config()
    assert costs.other_methods_bytes(chosen, plans, 2, 1, width=4) == {
        "adamw_ddp": 4 * (S * L + 7),
        "low_rank_ddp": 4 * (R * L + 7),
        "diloco": S * L + 7,
    }
    halves = costs.other_methods_bytes(chosen, plans, 2, 1, width=2)
    assert halves == {k: v / 2 for k, v in costs.other_methods_bytes(chosen, plans, 2, 1, width=4).items()}
    # The ranks of a replica divide what crosses.
    assert costs.other_methods_bytes(chosen, [MATRIX], 2, 4, width=4)["adamw_ddp"] == S * L


# -- state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "replicas", "floats"),
    [
        ({}, 2, {"exp_avg": R * L, "exp_avg_sq": R * L, "basis": S * R, "anchor": S * L}),
        ({"qh_mode": "factored"}, 2, {"row_mean_sq": S, "col_mean_sq": L}),
        ({"error_feedback": "fp32"}, 2, {"error": S * L}),
        ({"error_feedback": "bf16"}, 2, {"error": S * L / 2}),
        ({"anchor": {"dtype": "bf16"}}, 2, {"anchor": S * L / 2}),
        ({"outer": {"momentum": 0.7}}, 1, {"anchor": S * L, "outer_momentum": S * L}),
        ({"basis_source": "gradient", "qh_mode": "none"}, 1, {"anchor": 0}),
    ],
)
def test_the_state_of_a_matrix_is_what_the_readme_says(
    settings: dict[str, Any], replicas: int, floats: dict[str, float]
) -> None:
    found = costs.state_bytes(config(**settings), MATRIX_ALONE, replicas)
    assert {kind: found.get(kind, 0) for kind in floats} == {kind: 4 * numel for kind, numel in floats.items()}


def test_adamw_keeps_two_moments_of_every_element_and_dense_parameters_are_adamws() -> None:
    assert costs.adamw_bytes(HOLDINGS) == 2 * 4 * (S * L + 7)
    dense = costs.state_bytes(config(), DENSE_ALONE, 2)
    assert dense == {"dense_exp_avg": 28, "dense_exp_avg_sq": 28, "anchor": 28}


SETTINGS = st.fixed_dictionaries(
    {
        "qh_mode": st.sampled_from(["full_rank", "factored"]),
        "error_feedback": st.sampled_from([False, "bf16", "fp32"]),
        "outer": st.sampled_from([{}, {"momentum": 0.7}]),
        "anchor": st.sampled_from([{}, {"dtype": "bf16"}]),
        "basis_source": st.sampled_from(["pseudo_gradient", "gradient"]),
    }
)


@st.composite
def cut_plans(draw: st.DrawFn) -> tuple[ParameterPlan, tuple[tuple[int, int], ...]]:
    rows, columns, shards = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    inside = sorted(draw(st.lists(st.integers(0, rows * columns), min_size=shards - 1, max_size=shards - 1)))
    edges = [0, *inside, rows * columns]
    intervals = tuple((a, b) if b > a else (0, 0) for a, b in itertools.pairwise(edges))
    if draw(st.booleans()):
        return ParameterPlan("w", (rows, columns), False, ""), intervals
    side = draw(st.sampled_from(["rows", "columns"]))
    rank = draw(st.integers(1, rows if side == "rows" else columns))
    return ParameterPlan("w", (rows, columns), True, "", side=side, rank=rank), intervals


@given(SETTINGS, cut_plans(), st.sampled_from([torch.float32, torch.float64]))
def test_however_a_parameter_is_cut_its_state_is_as_large_as_predicted(
    settings: dict[str, Any], cut: tuple[ParameterPlan, tuple[tuple[int, int], ...]], dtype: torch.dtype
) -> None:
    (plan, intervals), chosen = cut, config(**settings)
    for shard, (start, stop) in enumerate(intervals):
        comm = InsideComm()
        comm.index, comm.size = shard, len(intervals)
        inside, weight = InsideReplica(shard=comm), torch.zeros(stop - start, dtype=dtype)
        item = Fragment(plan, weight, 0, intervals, inside, {}, {"betas": (0.9, 0.999)})
        item.allocate(chosen)
        # The shards' communicator is only asked where it stands: `start` of one replica sends nothing.
        OuterSync(chosen, [item], ReplicaWire(), InsideReplica()).start(resuming=True)
        counted = {kind: size for kind, size in state_bytes([item]).items() if size}
        held = Holding(plan, intervals, shard, weight.element_size())
        predicted = costs.state_bytes(chosen, [held], replicas=1)
        assert {kind: size for kind, size in predicted.items() if size} == counted
        assert item.holding.numel == item.numel
        # Border rows are never more than all.
        moments = sum(size for kind, size in counted.items() if kind in ("exp_avg", "exp_avg_sq", "col_mean_sq"))
        assert 0 <= border_copy_bytes([item]) <= moments


def test_a_border_row_is_a_copy_on_all_shards_but_the_one_that_holds_its_first_element() -> None:
    plan = ParameterPlan("w", (4, 3), True, "", side="columns", rank=2)
    intervals = ((0, 5), (5, 12))  # row 1 is on both
    held = [Holding(plan, intervals, shard) for shard in (0, 1)]
    assert [costs.border_copy_bytes([one], factored=False) for one in held] == [0, 2 * 2 * 4]
    assert [costs.border_copy_bytes([one], factored=True) for one in held] == [0, (2 * 2 + 1) * 4]


# -- work --------------------------------------------------------------------------------------------


def test_a_step_multiplies_with_the_basis_twice_and_with_error_feedback_three_times() -> None:
    assert costs.step_flops(config(), HOLDINGS) == 4 * S * L * R
    assert costs.step_flops(config(error_feedback="fp32"), HOLDINGS) == 6 * S * L * R


def test_orthogonalizing_costs_what_the_readme_says() -> None:
    assert costs.orthogonalization_flops(S, L) == 20 * S * S * L + 10 * S**3
    assert costs.sync_flops(config(), [MATRIX, BIAS]) == 0
    chosen = config(outer={"momentum": 0.7, "orthogonalize": True})
    assert costs.sync_flops(chosen, [MATRIX, BIAS]) == 20 * S * S * L + 10 * S**3
