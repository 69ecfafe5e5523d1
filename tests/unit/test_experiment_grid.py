"""The grid of experiments: what it expands to, in which order it is bought, what its summary says."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.grid import Grid, _laid_over, expand, load_grid, middle_out, rates_to_try
from lab.measures import effective_rank, gap, spectra, stable_rank
from lab.plots import ceiling
from lab.report import by_seed
from lab.results import COLUMNS, append_row, read_rows
from lab.spec import RunSpec, SpecError
from lab.summary import at_most, difference, lines_of, pooled_noise

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT: dict[str, Any] = {
    "base": {"model": "nano", "replicas": 2, "sequences": 4, "steps": 8, "settings": {"rank": 4, "sync_interval": 4}},
    "lrs": [1e-3, 2e-3, 4e-3],
    "seeds": [0, 1, 2],
    "methods": {
        "paper": {"about": "as published"},
        "adamw": {"settings": {"replica_size": "all", "low_rank": {"exclude": [".*"]}, "sync_interval": 1}},
    },
    "claims": {
        "quality": {"methods": ["paper", "adamw"]},
        "ranks": {"methods": ["paper"], "axes": {"rank": [2, 4]}, "seeds": [0, 1]},
    },
}


def row(spec: RunSpec, loss: float, claim: str = "quality") -> dict[str, Any]:
    return {
        **dict.fromkeys(COLUMNS, math.nan),
        "id": spec.id,
        "cell": spec.cell,
        "claim": claim,
        "method": spec.method,
        "seed": spec.seed,
        "lr": spec.lr,
        "val_loss": loss,
        "config": spec.to_json(),
        "curve": "{}",
    }


def bought(grid: Grid, losses: dict[float, float]) -> list[RunSpec]:
    """Everything the grid wants, in order, where a run's loss is that of its learning rate."""
    rows: list[dict[str, Any]] = []
    order = []
    while pending := grid.pending(rows):
        order.append(pending[0])
        rows.append(row(pending[0], losses[pending[0].lr]))
    return order


def test_runs_are_bought_breadth_first_and_shared_ones_once() -> None:
    grid = expand(DOCUMENT)
    order = bought(grid, {1e-3: 2.0, 2e-3: 1.5, 4e-3: 1.8})
    keys = [(spec.method, spec.config.rank, spec.lr, spec.seed) for spec in order]
    # The middle rate of every cell of every claim first; the cell of rank 4 is both claims'.
    assert keys[:3] == [("paper", 4, 2e-3, 0), ("paper", 2, 2e-3, 0), ("adamw", 4, 2e-3, 0)]
    assert {key[2] for key in keys[3:6]} == {1e-3} and {key[2] for key in keys[6:9]} == {4e-3}
    # Then the second seed of all at the best rate, then the third where a claim asks for it.
    assert [key[2:] for key in keys[9:]] == [(2e-3, 1)] * 3 + [(2e-3, 2)] * 2
    assert len(keys) == len(set(keys)) == grid.runs_in_all()
    shared = grid.cells[0].key
    assert grid.claims_of(shared) == "quality+ranks"


def test_later_seeds_wait_for_the_search_of_the_rate() -> None:
    grid = expand(DOCUMENT, only=["ranks"])
    specs = grid.cells[0].specs
    rows = [row(specs[1e-3, 0], 3.0), row(specs[2e-3, 0], 2.0)]
    assert all(spec.seed == 0 for spec in grid.pending(rows) if spec.cell == grid.cells[0].key)
    rows.append(row(specs[4e-3, 0], math.inf))
    assert [(s.lr, s.seed) for s in grid.pending(rows) if s.cell == grid.cells[0].key] == [(2e-3, 1)]


def searched(losses: dict[float, float]) -> list[float]:
    """The rates that a search over these runs, in order."""
    known: dict[float, float] = {}
    while rates := rates_to_try(tuple(losses), known):
        known[rates[0]] = losses[rates[0]]
    return list(known)


def test_the_search_goes_on_until_the_best_rate_has_both_neighbours() -> None:
    rates = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert searched(dict(zip(rates, [6, 5, 4, 5, 6, 7], strict=True))) == [4.0, 8.0, 2.0]
    assert searched(dict(zip(rates, [9, 8, 7, 6, 5, 5.5], strict=True))) == [4.0, 8.0, 2.0, 16.0, 32.0]
    assert searched(dict(zip(rates, [1, 2, 3, math.inf, math.nan, 9], strict=True))) == [4.0, 8.0, 2.0, 1.0]
    assert searched({1.0: 2.0}) == [1.0]


def test_equal_runs_have_equal_ids_however_they_are_written() -> None:
    base = dict(method="m", model="nano", replicas=2, sequences=4, steps=8, lr=1e-3, seed=0)
    short = RunSpec(**base, settings={"rank": 4})  # type: ignore[arg-type]
    long = RunSpec(**base, settings={"rank": 4, "omega": 0.5, "qh_mode": "full_rank", "lr": 9.0})  # type: ignore[arg-type]
    preset = RunSpec(**base, settings={"rank": 4, "preset": "recommended"})  # type: ignore[arg-type]
    outer = {"lr": 1.0, "momentum": 0.7, "orthogonalize": True, "residual_gain": 2.0}
    written = {"qh_mode": "factored", "omega": 0.9, "residual_weight": 0.25, "outer": outer}
    assert short.id == long.id and short.cell == long.cell != preset.cell
    assert preset.id == RunSpec(**base, settings={"rank": 4, **written}).id  # type: ignore[arg-type]
    again = RunSpec.from_json(short.to_json())
    assert again.id == short.id and again.config == short.config
    assert RunSpec(**{**base, "lr": 2e-3}, settings={"rank": 4}).cell == short.cell  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d["claims"]["quality"]["methods"].append("typo"), "no method 'typo'"),
        (lambda d: d["base"].update(model="huge"), "must be one of"),
        (lambda d: d["base"].update(sequences=5), "multiple of replicas"),
        (lambda d: d["base"]["settings"].update(rnak=3), "rnak"),
        (lambda d: d["claims"]["quality"].update(axis={}), "unknown key 'axis'"),
        (lambda d: d["methods"]["paper"].update(batch=3), "unknown key 'batch'"),
        (lambda d: d["methods"]["paper"].update(slow={"interval": 4}), "slow is for one replica"),
    ],
)
def test_a_grid_that_describes_no_run_is_refused_by_name(change: Any, complaint: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    change(document)
    with pytest.raises(SpecError, match=complaint):
        expand(document)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "experiments").glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("tier", ["small", "full"])
def test_committed_grids_expand_and_give_every_method_the_same_rates(path: Path, tier: str) -> None:
    grid = load_grid(path, tier)
    for claim in grid.claims:
        cells = [cell for cell in grid.cells if cell.claim == claim]
        assert len({(cell.lrs, cell.seeds) for cell in cells}) == 1
        tokens = {spec.steps * spec.sequences for cell in cells for spec in cell.specs.values()}
        assert len(tokens) == 1, f"{claim}: not at equal tokens: {tokens}"


def test_an_axis_may_set_several_keys_and_a_tier_may_take_a_claim_away() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["claims"]["ranks"]["axes"] = {"+batch": [{"sequences": 2, "steps": 16}, {"sequences": 4, "omega": 0.9}]}
    first, second = (cell.specs[1e-3, 0] for cell in expand(document, only=["ranks"]).cells)
    assert (first.sequences, first.steps, first.config.omega) == (2, 16, 0.5)
    assert (second.sequences, second.steps, second.config.omega) == (4, 8, 0.9)
    laid_over = _laid_over(document, {"claims": {"quality": None}, "base": {"settings": {"rank": 3}}})
    assert list(laid_over["claims"]) == ["ranks"]
    assert laid_over["base"]["settings"] == {"rank": 3, "sync_interval": 4}


def test_the_top_of_a_loss_axis_ignores_what_is_far_worse() -> None:
    assert 3.2 < ceiling([3.0, 3.1, 3.2, 9.0]) < 3.4
    assert ceiling([3.0, math.inf]) < 3.1 and ceiling([]) == 1.0


def test_middle_out() -> None:
    assert middle_out((1.0, 2.0, 4.0)) == [2.0, 1.0, 4.0]
    assert middle_out((4.0, 1.0, 8.0, 2.0)) == [2.0, 4.0, 1.0, 8.0]


def test_a_line_takes_the_best_rate_of_the_first_seed_and_marks_the_grids_ends(tmp_path: Path) -> None:
    cell = expand(DOCUMENT).cells[0]
    losses = {(1e-3, 0): 3.0, (2e-3, 0): 2.5, (4e-3, 0): 2.0, (4e-3, 1): 2.2, (4e-3, 2): 2.1}
    for (lr, seed), loss in losses.items():
        append_row(tmp_path / "results.csv", row(cell.specs[lr, seed], loss))
    (line,) = lines_of(read_rows(tmp_path / "results.csv"), "quality")
    assert (line.lr, line.edge, line.losses) == (4e-3, ">", {0: 2.0, 1: 2.2, 2: 2.1})
    assert line.mean == pytest.approx(2.1) and line.noise == pytest.approx(0.1)
    assert pooled_noise([line]) == pytest.approx(0.1)
    assert difference(line, line) == (0.0, 0.0)


def compared(losses: dict[str, list[float]]) -> dict[str, list[str]]:
    """The cells of the table by seed, by method; a rate of 2e-3, and 100 bytes a step for `paper`, 10 for `adamw`."""
    rows = []
    for cell in expand(DOCUMENT, only=["quality"]).cells:
        for seed, loss in enumerate(losses[(spec := cell.specs[2e-3, 0]).method]):
            sent = 8 * (100 if spec.method == "paper" else 10)
            rows.append({**row(cell.specs[2e-3, seed], loss), "steps": 8, "bytes": sent, "bytes_ddp": 4000})
    lines = lines_of(rows, "quality")
    table = by_seed(lines, next(line for line in lines if line.method == "paper")).splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in found[2:]}


def test_the_table_by_seed_has_bytes_a_step_and_pairs_the_perplexities() -> None:
    found = compared({"paper": [2.0, 2.2, 2.1], "adamw": [2.0 + math.log(1.01), 2.2 + math.log(1.02), 2.1]})
    assert list(found) == ["paper", "adamw"], "what sends most comes first"
    assert found["paper"] == ["0.002!", "100", "1/5.0", "2.0000", "2.2000", "2.1000", "", ""]
    assert found["adamw"][1:3] == ["10", "1/50.0"]
    assert found["adamw"][-2:] == ["+1.00% ± 1.00", "undecided"]
    one_seed = compared({"paper": [2.0, 2.2, 2.1], "adamw": [2.0 + math.log(1.01)]})
    assert one_seed["adamw"][3:] == ["2.0100", "", "", "+1.00%", "one seed"]
    diverged = compared({"paper": [2.0, 2.2, 2.1], "adamw": [2.0, math.inf, 2.1]})
    assert diverged["adamw"][-2:] == ["diverged", "no"]


def test_a_mean_is_at_most_a_limit_only_where_its_error_leaves_no_doubt() -> None:
    assert at_most(0.5, [0.1, 0.2, 0.3]) == "yes" and at_most(0.5, [-3.0, -2.0, -1.0]) == "yes"
    assert at_most(0.5, [0.8, 0.9, 1.0]) == "no"
    assert at_most(0.5, [0.2, 0.7, 0.5]) == at_most(0.5, [0.4, 0.9, 0.6]) == "undecided"
    # One standard error would decide these.
    assert at_most(0.5, [0.0, 0.2, 0.7]) == at_most(0.5, [0.6, 0.7, 1.2]) == "undecided"
    assert at_most(0.5, [0.1]) == at_most(0.5, [9.0]) == "one seed"


def test_variants_are_named_by_what_varies() -> None:
    cells = expand(DOCUMENT, only=["ranks"]).cells
    rows = [row(cell.specs[2e-3, 0], 2.0 + i, "ranks") for i, cell in enumerate(cells)]
    assert [line.name for line in lines_of(rows, "ranks")] == ["paper rank=2", "paper rank=4"]


def test_a_line_that_was_cut_off_is_not_a_result(tmp_path: Path) -> None:
    cell, path = expand(DOCUMENT).cells[0], tmp_path / "results.csv"
    append_row(path, row(cell.specs[1e-3, 0], 3.0))
    with path.open("a") as stream:
        stream.write("abc,def")
    assert [found["id"] for found in read_rows(path)] == [cell.specs[1e-3, 0].id]


def test_spectra_see_a_frozen_subspace() -> None:
    generator = torch.Generator().manual_seed(0)
    start, left = torch.randn(12, 8, generator=generator), torch.randn(12, 2, generator=generator)
    frozen = start + left @ torch.randn(2, 8, generator=generator)
    found = spectra([("layers.0.attention.out.weight", frozen, start, 2)])
    assert found["outside"] < 1e-10 and found["attention_change_gap_at_rank"] > 1e5
    moved = start + torch.randn(12, 8, generator=generator)
    assert spectra([("a", moved, start, 2)])["outside"] > 0.1
    assert effective_rank(torch.ones(5)) == pytest.approx(5) and stable_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.zeros(3)) == 0 and gap(torch.tensor([3.0, 1.0]), 1) == 3 and gap(torch.ones(2), 2) == 1
    json.dumps(found)
