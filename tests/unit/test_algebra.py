"""What the algebra promises: where weights can go, what the optimizer reduces to, and what its state is."""

from __future__ import annotations

import copy
import io
import json
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lordo_ds import ConfigError, LoRDO, LordoConfig
from lordo_ds.core.basis import overlap
from lordo_ds.core.grouping import plan_parameters
from lordo_ds.core.reference import Reference
from tests import problems

RANK = 2
SHAPES = {"tall": (12, 6), "wide": (6, 10), "square": (7, 7)}
OUTER = {"lr": 0.7, "momentum": 0.7}
Named = list[tuple[str, nn.Parameter]]


def parameters(dtype: torch.dtype = torch.float64, seed: int = 3, bias: bool = False) -> Named:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {**SHAPES, "bias": (5,)} if bias else dict(SHAPES)
    return [
        (name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)))
        for name, shape in shapes.items()
    ]


def set_gradients(named: Named, step: int) -> None:
    """The gradient of |W - target|^2 / 2 with a target and a noise that depend on the name and the step."""
    for index, (_, weight) in enumerate(named):
        generator = torch.Generator().manual_seed(1000 * step + index)
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
        weight.grad = 0.3 * weight.detach() + noise


def train(named: Named, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last + 1):
        set_gradients(named, step)
        optimizer.step()


def lordo(named: Named, **settings: Any) -> LoRDO:
    return LoRDO(named, **{"lr": 1e-2, "rank": RANK, "sync_interval": 3, "eps": 1e-4, **settings})


def basis_of(optimizer: LoRDO, name: str, weight: nn.Parameter) -> Tensor:
    basis: Tensor = optimizer.state[weight][name]["basis"]
    return basis.clone()


def report_of(optimizer: LoRDO) -> Any:
    assert optimizer.last_report is not None
    return optimizer.last_report


# -- where the weights can go (arXiv 2602.04396: stagnation without a full-rank term) ------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("basis_update", ["power", "eigh", "svd"])
@pytest.mark.parametrize("mode", ["none", "low_rank"])
def test_without_a_full_rank_term_the_basis_never_moves_and_the_total_change_has_rank_r(
    mode: str, basis_update: str, dtype: torch.dtype
) -> None:
    named = parameters(dtype)
    start = [weight.detach().clone() for _, weight in named]
    optimizer = lordo(named, qh_mode=mode, basis_update=basis_update)
    for sync in range(12):
        train(named, optimizer, 3 * sync + 1, 3 * sync + 3)
        assert round(report_of(optimizer).overlap, 4) == 1.0
    for (_, weight), before in zip(named, start, strict=True):
        values = torch.linalg.svdvals((weight.detach() - before).double())
        noise = 1e-5 if dtype == torch.float32 else 1e-12
        assert values[RANK - 1] > 1e-2 * values[0]
        assert values[RANK] < noise * values[0]


@pytest.mark.parametrize("mode", ["full_rank", "factored"])
def test_with_a_full_rank_term_the_basis_moves_and_the_total_change_has_full_rank(mode: str) -> None:
    named = parameters()
    start = [weight.detach().clone() for _, weight in named]
    optimizer = lordo(named, qh_mode=mode, omega=0.5)
    overlaps = []
    for sync in range(12):
        train(named, optimizer, 3 * sync + 1, 3 * sync + 3)
        overlaps.append(report_of(optimizer).overlap)
    assert max(overlaps) < 0.999 and min(overlaps) > 0
    for (_, weight), before in zip(named, start, strict=True):
        values = torch.linalg.svdvals(weight.detach() - before)
        assert values[-1] > 1e-4 * values[0]


@pytest.mark.parametrize("mode", ["none", "full_rank"])
def test_replicas_stagnate_together_without_the_term_and_move_with_it(mode: str) -> None:
    config = LordoConfig.parse({"lr": 1e-2, "eps": 1e-2, "rank": RANK, "sync_interval": 3, "qh_mode": mode})
    plans = plan_parameters(config, problems.facts())
    reference = Reference(config, plans, [problems.initial_weights(torch.float64) for _ in range(3)])
    start = problems.initial_weights(torch.float64)
    overlaps: list[float] = []
    previous = None
    for step in range(1, 19):
        reference.step([problems.gradients(step, m, torch.float64) for m in range(3)])
        basis = reference.state[0]["square"]["Q"]
        if previous is not None and step % 3 == 0:
            overlaps.append(overlap(basis, previous))
        previous = basis
    values = torch.linalg.svdvals(reference.weights[0]["square"] - start["square"])
    assert (min(overlaps) > 1 - 1e-9) == (mode == "none") == (float(values[RANK]) < 1e-10)


def test_the_captured_gradient_energy_is_reported_and_is_that_of_the_last_gradient_in_the_old_basis() -> None:
    named = parameters()
    optimizer = lordo(named, qh_mode="full_rank")
    train(named, optimizer, 1, 5)
    bases = [basis_of(optimizer, name, weight) for name, weight in named]
    train(named, optimizer, 6, 6)
    inside = energy = 0.0
    for (name, weight), basis in zip(named, bases, strict=True):
        gradient = weight.grad if name == "wide" else weight.grad.mT  # type: ignore[union-attr]
        inside += float((basis.mT @ gradient).square().sum())  # type: ignore[operator]
        energy += float(gradient.square().sum())  # type: ignore[union-attr]
    report = report_of(optimizer)
    assert report.step == 6
    assert report.captured_gradient_energy == pytest.approx(inside / energy)
    assert 0 < report.captured_gradient_energy < 1


# -- what it reduces to --------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_at_full_rank_the_weights_move_as_adamw_on_the_coordinates_in_the_first_basis(
    weight_decay: float,
) -> None:
    """W = Q x with Q square: one replica, qh_mode none, no error feedback, before any refresh."""
    named = parameters()
    optimizer = lordo(named, rank=99, qh_mode="none", sync_interval=1000, weight_decay=weight_decay)
    start = [weight.detach().clone() for _, weight in named]
    train(named, optimizer, 1, 1)
    for index, (name, weight) in enumerate(named):
        wide = name == "wide"
        basis = basis_of(optimizer, name, weight)
        assert basis.shape == (min(weight.shape), min(weight.shape))
        own = nn.Parameter(start[index].clone())
        coordinates = nn.Parameter(basis.mT @ (own.detach() if wide else own.detach().mT))
        adamw = torch.optim.AdamW([coordinates], lr=1e-2, eps=1e-4, weight_decay=weight_decay)
        alone: Named = [(other, own if other == name else weight) for other, weight in named]
        with torch.no_grad():
            for step in range(1, 8):
                own.copy_(basis @ coordinates if wide else (basis @ coordinates).mT)
                set_gradients(alone, step)
                coordinates.grad = basis.mT @ (own.grad if wide else own.grad.mT)  # type: ignore[union-attr,operator]
                adamw.step()
            lifted = basis @ coordinates
        if index == 0:
            train(named, optimizer, 2, 7)
        torch.testing.assert_close(weight.detach(), lifted if wide else lifted.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_one_replica_without_low_rank_parameters_is_torch_adamw(dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = parameters(dtype, bias=True), parameters(dtype, bias=True)
    optimizers: list[torch.optim.Optimizer] = []
    for named in (ours, theirs):
        groups = [
            {"params": named[:2], "weight_decay": 0.3},
            {"params": named[2:], "lr": 3e-2, "betas": (0.5, 0.8)},
        ]
        if named is ours:
            settings = {"low_rank": {"exclude": [".*"]}, "sync_interval": 2, "weight_decay": 0.1}
            optimizers.append(LoRDO(groups, lr=1e-2, **settings))
        else:
            optimizers.append(torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1))
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5) for optimizer in optimizers]
    for step in range(1, 9):
        for named, optimizer, scheduler in zip((ours, theirs), optimizers, schedulers, strict=True):
            train(named, optimizer, step, step)
            scheduler.step()
    for (name, weight), (_, expected) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("mode", ["full_rank", "factored", "none"])
def test_syncing_every_step_with_the_default_outer_is_parameter_averaging(mode: str) -> None:
    config = LordoConfig.parse({"lr": 1e-2, "eps": 1e-2, "rank": RANK, "sync_interval": 1, "qh_mode": mode})
    apart_config = LordoConfig.parse({**config.model_dump(), "sync_interval": 1000})
    plans = plan_parameters(config, problems.facts())
    together = Reference(config, plans, [problems.initial_weights(torch.float64) for _ in range(3)])
    for step in range(1, 6):
        apart = copy.deepcopy(together)
        apart.config = apart_config  # the same inner step, and no sync after it
        for one in (together, apart):
            one.step([problems.gradients(step, m, torch.float64) for m in range(3)])
        for plan in plans:
            mean = torch.stack([weights[plan.name] for weights in apart.weights]).mean(0)
            for weights in together.weights:
                torch.testing.assert_close(weights[plan.name], mean, rtol=0, atol=1e-14)


def test_one_replica_with_plain_averaging_is_not_moved_by_a_sync() -> None:
    named = parameters(bias=True)
    optimizer = lordo(named)
    train(named, optimizer, 1, 2)
    held = copy.deepcopy(named)
    apart = lordo(held, sync_interval=1000)
    apart.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(named, optimizer, 3, 3)
    train(held, apart, 3, 3)
    assert optimizer.synced and not apart.synced
    for (name, weight), (_, expected) in zip(named, held, strict=True):
        assert torch.equal(weight, expected), name


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    named = parameters(bias=True)
    optimizer = lordo(named, weight_decay=0.1)
    for step in range(1, 5):
        set_gradients(named, step)
        named[1][1].grad = named[3][1].grad = None
        before = [weight.detach().clone() for _, weight in named]
        optimizer.step()
        for index, (_, weight) in enumerate(named):
            assert torch.equal(weight.detach(), before[index]) == (index in (1, 3))


# -- failures ------------------------------------------------------------------------------------------


def test_a_failing_decomposition_keeps_every_basis_says_so_once_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    named = parameters()
    optimizer = lordo(named, basis_update="eigh")
    train(named, optimizer, 1, 3)
    bases = [basis_of(optimizer, name, weight) for name, weight in named]

    def fail(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with caplog.at_level(logging.WARNING, logger="lordo_ds"):
        train(named, optimizer, 4, 9)  # two syncs
    for (name, weight), basis in zip(named, bases, strict=True):
        assert torch.equal(basis_of(optimizer, name, weight), basis)
        assert bool(torch.isfinite(weight).all())
        assert "failed to converge" in report_of(optimizer).basis_notes[name]
        told = [r for r in caplog.records if name in r.getMessage() and "keeping the previous basis" in r.getMessage()]
        assert len(told) == 1
    monkeypatch.undo()
    train(named, optimizer, 10, 12)
    assert report_of(optimizer).basis_notes == {}
    assert not torch.equal(basis_of(optimizer, *named[0]), bases[0])


def test_one_replica_that_is_not_finite_at_a_sync_returns_to_its_anchor() -> None:
    """'If none is finite, all return to the anchor': one replica is all of them."""
    named = parameters()
    optimizer = lordo(named, outer=OUTER)
    train(named, optimizer, 1, 3)
    anchor = [weight.detach().clone() for _, weight in named]
    set_gradients(named, 4)
    named[0][1].grad.fill_(float("nan"))  # type: ignore[union-attr]
    optimizer.step()
    train(named, optimizer, 5, 6)
    assert report_of(optimizer).returned_to_anchor
    for (name, weight), expected in zip(named, anchor, strict=True):
        assert torch.equal(weight.detach(), expected), name
    train(named, optimizer, 7, 9)
    assert all(bool(torch.isfinite(weight).all()) for _, weight in named)


def test_a_second_final_sync_at_the_same_step_changes_nothing() -> None:
    named = parameters(bias=True)
    optimizer = lordo(named, outer=OUTER)
    train(named, optimizer, 1, 4)
    assert optimizer.final_sync()
    once = [weight.detach().clone() for _, weight in named]
    optimizer.final_sync()
    for (name, weight), expected in zip(named, once, strict=True):
        assert torch.equal(weight.detach(), expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_alone_are_refused_by_name(dtype: torch.dtype) -> None:
    named = parameters(dtype)
    optimizer = lordo(named)
    set_gradients(named, 1)
    with pytest.raises(ConfigError, match=f"tall is {dtype}: give fp32 or fp64"):
        optimizer.step()


# -- state ---------------------------------------------------------------------------------------------

STATES: dict[str, dict[str, Any]] = {
    "paper": {},
    "recommended": {"preset": "recommended"},
    "error_bf16": {"error_feedback": "bf16", "qh_mode": "none"},
    "error_fp32": {"error_feedback": "fp32", "basis_source": "complement"},
    "gradient_source": {"error_feedback": "bf16", "basis_source": "gradient", "qh_mode": "none"},
    "anchor_bf16": {"anchor": {"dtype": "bf16"}, "outer": OUTER},
    "svd_warm_up": {"basis_update": "svd", "sync_warmup_steps": 4, "outer": OUTER},
    "dense": {"low_rank": {"exclude": [".*"]}, "outer": OUTER},
}


def saved_and_read(optimizer: LoRDO) -> dict[str, Any]:
    """The state after a round trip through torch.save and torch.load(weights_only=True)."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def assert_same_state(one: Any, other: Any, where: str = "state") -> None:
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same_state(value, other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, value in enumerate(one):
            assert_same_state(value, other[index], f"{where}[{index}]")
    else:
        assert one == other, where


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("saved_after", [3, 4])
@pytest.mark.parametrize("settings", STATES.values(), ids=STATES.keys())
def test_a_resumed_optimizer_continues_bitwise_and_its_state_keeps_its_dtypes(
    settings: dict[str, Any], saved_after: int, dtype: torch.dtype
) -> None:
    named = parameters(dtype, bias=True)
    optimizer = lordo(named, **settings)
    train(named, optimizer, 1, saved_after)
    weights = {name: weight.detach().clone() for name, weight in named}
    saved = saved_and_read(optimizer)
    assert_same_state(saved, optimizer.state_dict())

    resumed = parameters(dtype, seed=99, bias=True)
    with torch.no_grad():
        for name, weight in resumed:
            weight.copy_(weights[name])
    other = lordo(resumed, **settings)
    other.load_state_dict(saved)
    assert_same_state(other.state_dict(), saved)

    train(named, optimizer, saved_after + 1, 10)
    train(resumed, other, saved_after + 1, 10)
    for (name, weight), (_, expected) in zip(resumed, named, strict=True):
        assert bits(weight) == bits(expected), name
    assert_same_state(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize(("error_feedback", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_error_is_kept_in_its_own_precision_but_that_of_fp64_weights_in_fp64(
    error_feedback: str, dtype: torch.dtype
) -> None:
    for weight_dtype in (torch.float32, torch.float64):
        named = parameters(weight_dtype)
        optimizer = lordo(named, error_feedback=error_feedback)
        train(named, optimizer, 1, 2)
        states = [saved for tensor in saved_and_read(optimizer)["state"].values() for saved in tensor.values()]
        assert len(states) == len(named)
        for saved in states:
            assert saved["error"].dtype == (dtype if weight_dtype == torch.float32 else torch.float64)
            assert saved["exp_avg"].dtype == saved["basis"].dtype == weight_dtype


def test_the_saved_state_holds_tensors_and_plain_values_only() -> None:
    def check(value: Any, where: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                assert isinstance(key, (str, int)), where
                check(inner, f"{where}[{key!r}]")
        elif isinstance(value, (list, tuple)):
            for index, inner in enumerate(value):
                check(inner, f"{where}[{index}]")
        else:
            assert value is None or type(value) in (Tensor, bool, int, float, str), f"{where}: {type(value)}"
            assert not isinstance(value, np.generic), where

    named = parameters(bias=True)
    optimizer = lordo(named, preset="recommended", error_feedback="bf16")
    train(named, optimizer, 1, 4)
    check(optimizer.state_dict(), "state")


def test_loading_copies_the_state_and_the_saved_one_stays_as_it_is() -> None:
    named = parameters()
    optimizer = lordo(named)
    train(named, optimizer, 1, 2)
    saved = saved_and_read(optimizer)
    held = copy.deepcopy(saved)
    other_named = copy.deepcopy(named)
    other = lordo(other_named)
    other.load_state_dict(saved)
    train(other_named, other, 3, 6)
    assert_same_state(saved, held)


def test_a_state_saved_before_the_first_step_is_loaded_as_a_fresh_start() -> None:
    named = parameters()
    saved = saved_and_read(lordo(named))
    other_named = copy.deepcopy(named)
    other, optimizer = lordo(other_named), lordo(named)
    other.load_state_dict(saved)
    train(named, optimizer, 1, 4)
    train(other_named, other, 1, 4)
    for (name, weight), (_, expected) in zip(other_named, named, strict=True):
        assert torch.equal(weight, expected), name


def refusal(saved: dict[str, Any], optimizer: LoRDO) -> str:
    with pytest.raises(ValueError) as caught:
        optimizer.load_state_dict(saved)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def a_saved_state(dtype: torch.dtype = torch.float64, **settings: Any) -> dict[str, Any]:
    named = parameters(dtype, bias=True)
    optimizer = lordo(named, **settings)
    train(named, optimizer, 1, 4)
    return saved_and_read(optimizer)


@pytest.mark.parametrize(
    ("key", "saved_with", "loaded_with"),
    [
        ("rank", {"rank": 2}, {"rank": 3}),
        ("error_feedback", {}, {"error_feedback": "bf16"}),
        ("error_feedback", {"error_feedback": "bf16"}, {}),
        ("error_feedback", {"error_feedback": "bf16"}, {"error_feedback": "fp32"}),
        ("qh_mode", {}, {"qh_mode": "factored"}),
        ("qh_mode", {"qh_mode": "factored"}, {}),
        ("outer", {}, {"outer": OUTER}),
        ("outer", {"outer": OUTER}, {}),
        ("low_rank", {}, {"low_rank": {"exclude": [".*"]}}),
        ("anchor", {}, {"anchor": {"dtype": "bf16"}}),
    ],
    ids=lambda value: json.dumps(value),
)
def test_a_state_of_settings_that_need_other_state_is_refused_with_the_parameters_name(
    key: str, saved_with: dict[str, Any], loaded_with: dict[str, Any]
) -> None:
    saved = a_saved_state(torch.float32, **saved_with)
    message = refusal(saved, lordo(parameters(torch.float32, bias=True), **loaded_with))
    assert "tall" in message or key in message, message


def test_what_may_change_between_runs_is_not_refused() -> None:
    saved = a_saved_state()
    other = lordo(parameters(bias=True), lr=5e-3, sync_interval=6, omega=0.9, sync_warmup_steps=2)
    other.load_state_dict(saved)
    assert other.attempted_steps == 4 and other.next_sync_in == 2


def test_a_state_of_other_parameters_is_refused_with_both_names() -> None:
    saved = a_saved_state()
    named = parameters(bias=True)
    renamed = [(name.replace("wide", "narrow"), weight) for name, weight in named]
    message = refusal(saved, lordo(renamed))
    assert "'wide'" in message and "'narrow'" in message
    assert "holds 4 parameters, this model 3" in refusal(saved, lordo(named[:3]))


def test_a_state_of_another_optimizer_or_format_is_refused() -> None:
    named = parameters()
    adamw = torch.optim.AdamW(named)
    train(named, adamw, 1, 1)
    assert "was not saved by LoRDO" in refusal(adamw.state_dict(), lordo(parameters()))
    saved = a_saved_state()
    saved["lordo"]["format"] = 999
    assert "format 999" in refusal(saved, lordo(parameters(bias=True)))


def test_a_refused_state_leaves_the_optimizer_as_it_was() -> None:
    named = parameters(bias=True)
    optimizer = lordo(named)
    train(named, optimizer, 1, 4)
    before = copy.deepcopy(optimizer.state_dict())
    saved = a_saved_state()
    del saved["state"][2]["square"]["exp_avg_sq"]
    saved["state"][0]["tall"]["exp_avg"] += 1
    refusal(saved, optimizer)
    assert_same_state(optimizer.state_dict(), before)


def test_the_betas_of_a_loaded_state_are_the_ones_that_it_is_continued_with() -> None:
    """As torch's optimizers do: param_groups travel with the state; bias corrections depend on them."""
    named = parameters(bias=True)
    optimizer = lordo(named, betas=(0.6, 0.7))
    train(named, optimizer, 1, 4)
    resumed = copy.deepcopy(named)
    other = lordo(resumed)
    other.load_state_dict(saved_and_read(optimizer))
    train(named, optimizer, 5, 8)
    train(resumed, other, 5, 8)
    for (name, weight), (_, expected) in zip(resumed, named, strict=True):
        assert torch.equal(weight, expected), name
