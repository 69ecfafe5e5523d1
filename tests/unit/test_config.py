"""The settings block: defaults and presets of the contract, and one helpful line for everything illegal."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import ValidationError

from lordo_ds.config import PRESETS, LordoConfig, OuterOptimizer, TopK
from lordo_ds.errors import ConfigError

NAN, INF = float("nan"), float("inf")

# What is illegal, the key that the message must name, and the value that it must show.
ILLEGAL: list[tuple[dict[str, Any], str, Any]] = [
    ({"lr": -1}, "lr", -1),
    ({"lr": "auto"}, "lr", "auto"),
    ({"lr": None}, "lr", None),
    ({"lr": NAN}, "lr", NAN),
    ({"lr": INF}, "lr", INF),
    ({"lr": "1e-3\n2"}, "lr", "1e-3\n2"),
    ({"betas": [0.9]}, "betas", [0.9]),
    ({"betas": [0.9, 0.99, 0.999]}, "betas", [0.9, 0.99, 0.999]),
    ({"betas": 0.9}, "betas", 0.9),
    ({"betas": [0.9, 1.0]}, "betas", 1.0),
    ({"betas": [-0.1, 0.9]}, "betas", -0.1),
    ({"eps": -1e-8}, "eps", -1e-8),
    ({"eps": INF}, "eps", INF),
    ({"weight_decay": -0.1}, "weight_decay", -0.1),
    ({"weight_decay": "x"}, "weight_decay", "x"),
    ({"rank": 0}, "rank", 0),
    ({"rank": -3}, "rank", -3),
    ({"rank": 2.5}, "rank", 2.5),
    ({"rank": True}, "rank", True),
    ({"rank": None}, "rank", None),
    ({"rank": "0/8"}, "rank", "0/8"),
    ({"rank": "9/8"}, "rank", "9/8"),
    ({"rank": "1/0"}, "rank", "1/0"),
    ({"rank": "0.5"}, "rank", "0.5"),
    ({"rank": "abc"}, "rank", "abc"),
    ({"sync_interval": 0}, "sync_interval", 0),
    ({"sync_interval": 1.5}, "sync_interval", 1.5),
    ({"sync_interval": "32"}, "sync_interval", "32"),
    ({"sync_interval": True}, "sync_interval", True),
    ({"moment_sync_interval": 33}, "moment_sync_interval", 33),
    ({"moment_sync_interval": 0}, "moment_sync_interval", 0),
    ({"moment_sync_interval": -32}, "moment_sync_interval", -32),
    ({"moment_sync_interval": [32, 40]}, "moment_sync_interval", 40),
    ({"moment_sync_interval": [32]}, "moment_sync_interval", [32]),
    ({"moment_sync_interval": "always"}, "moment_sync_interval", "always"),
    ({"replica_size": 0}, "replica_size", 0),
    ({"replica_size": 1.5}, "replica_size", 1.5),
    ({"replica_size": "nod"}, "replica_size", "nod"),
    ({"projection": "globl"}, "projection", "globl"),
    ({"preset": "papr"}, "preset", "papr"),
    ({"preset": 3}, "preset", 3),
    ({"preset": ["paper"]}, "preset", ["paper"]),
    ({"qh_mode": "full"}, "qh_mode", "full"),
    ({"omega": 1.5}, "omega", 1.5),
    ({"omega": -0.1}, "omega", -0.1),
    ({"omega": NAN}, "omega", NAN),
    ({"omega": "high"}, "omega", "high"),
    ({"error_feedback": True}, "error_feedback", True),
    ({"error_feedback": "fp16"}, "error_feedback", "fp16"),
    ({"error_feedback": None}, "error_feedback", None),
    ({"error_feedback": 0}, "error_feedback", 0),
    ({"basis_source": "complment"}, "basis_source", "complment"),
    ({"basis_source": "complement", "qh_mode": "none"}, "basis_source", "complement"),
    ({"basis_source": "complement", "qh_mode": "low_rank"}, "basis_source", "complement"),
    ({"basis_update": "qr"}, "basis_update", "qr"),
    ({"average_dense_moments": "yes"}, "average_dense_moments", "yes"),
    ({"average_dense_moments": 1}, "average_dense_moments", 1),
    ({"low_rank": True}, "low_rank", True),
    ({"low_rank": {"include": "foo"}}, "low_rank.include", "foo"),
    ({"low_rank": {"include": ["("]}}, "low_rank.include", ["("]),
    ({"low_rank": {"exclude": [3]}}, "low_rank.exclude", 3),
    ({"outer": "nesterov"}, "outer", "nesterov"),
    ({"outer": {"lr": 0}}, "outer.lr", 0),
    ({"outer": {"lr": INF}}, "outer.lr", INF),
    ({"outer": {"momentum": 1.0}}, "outer.momentum", 1.0),
    ({"outer": {"momentum": -0.5}}, "outer.momentum", -0.5),
    ({"outer": {"momentum": NAN}}, "outer.momentum", NAN),
    ({"outer": {"nesterov": "y"}}, "outer.nesterov", "y"),
    ({"pseudo_gradient_dtype": "fp16"}, "pseudo_gradient_dtype", "fp16"),
    ({"pseudo_gradient_dtype": None}, "pseudo_gradient_dtype", None),
    ({"pseudo_gradient_dtype": 8}, "pseudo_gradient_dtype", 8),
    ({"pseudo_gradient_dtype": ["int8"]}, "pseudo_gradient_dtype", ["int8"]),
    ({"pseudo_gradient_dtype": {}}, "pseudo_gradient_dtype", {}),
    ({"pseudo_gradient_dtype": {"block": 64}}, "pseudo_gradient_dtype", {"block": 64}),
    ({"pseudo_gradient_dtype": {"top_k": 0}}, "pseudo_gradient_dtype", {"top_k": 0}),
    ({"pseudo_gradient_dtype": {"top_k": 2.5}}, "pseudo_gradient_dtype", {"top_k": 2.5}),
    ({"pseudo_gradient_dtype": {"top_k": True}}, "pseudo_gradient_dtype", {"top_k": True}),
    ({"pseudo_gradient_dtype": {"top_k": "64"}}, "pseudo_gradient_dtype", {"top_k": "64"}),
    ({"pseudo_gradient_dtype": {"top_k": NAN}}, "pseudo_gradient_dtype", {"top_k": NAN}),
    ({"pseudo_gradient_dtype": {"top_k": 9, "block": 8}}, "pseudo_gradient_dtype", {"top_k": 9, "block": 8}),
    ({"pseudo_gradient_dtype": {"top_k": 9, "block": 0}}, "pseudo_gradient_dtype", {"top_k": 9, "block": 0}),
    ({"pseudo_gradient_dtype": {"top_k": 9, "block": 4097}}, "pseudo_gradient_dtype", {"top_k": 9, "block": 4097}),
    ({"anchor": "cpu"}, "anchor", "cpu"),
    ({"anchor": {"device": "gpu"}}, "anchor.device", "gpu"),
    ({"anchor": {"dtype": "fp16"}}, "anchor.dtype", "fp16"),
    ({"streaming": {"fragments": 0}}, "streaming.fragments", 0),
    ({"streaming": {"delay_steps": -1}}, "streaming.delay_steps", -1),
    ({"sync_warmup_steps": -1}, "sync_warmup_steps", -1),
    ({"sync_warmup_steps": 1.5}, "sync_warmup_steps", 1.5),
    ({"max_nonfinite_syncs": 0}, "max_nonfinite_syncs", 0),
    ({"max_left_out_syncs": 0}, "max_left_out_syncs", 0),
    ({"max_left_out_syncs": "nevr"}, "max_left_out_syncs", "nevr"),
    ({"max_outlier": 1}, "max_outlier", 1),
    ({"max_outlier": "nevr"}, "max_outlier", "nevr"),
    ({"min_participants": 0}, "min_participants", 0),
    ({"min_participants": "3/2"}, "min_participants", "3/2"),
    ({"min_participants": "half"}, "min_participants", "half"),
    ({"min_participants": 0.5}, "min_participants", 0.5),
    ({"qh_mode": "factored", "residual_weight": -0.1}, "residual_weight", -0.1),
    ({"outer": {"residual_gain": 0}}, "outer.residual_gain", 0),
    ({"outer": {"orthogonalize": 1}}, "outer.orthogonalize", 1),
    ({"sync_timeout_s": 0}, "sync_timeout_s", 0),
    ({"sync_timeout_s": INF}, "sync_timeout_s", INF),
    ({"sync_timeout_s": "10 min"}, "sync_timeout_s", "10 min"),
    ({"wire_throttle": 100}, "wire_throttle", 100),
    ({"wire_throttle": True}, "wire_throttle", True),
    ({"wire_throttle": {"mbit_per_s": 0}}, "wire_throttle.mbit_per_s", 0),
    ({"wire_throttle": {"mbit_per_s": INF}}, "wire_throttle.mbit_per_s", INF),
    ({"wire_throttle": {"mbit_per_s": "fast"}}, "wire_throttle.mbit_per_s", "fast"),
    ({"wire_throttle": {"latency_ms": 5}}, "wire_throttle.mbit_per_s", {"latency_ms": 5}),
    ({"wire_throttle": {"mbit_per_s": 10, "latency_ms": -1}}, "wire_throttle.latency_ms", -1),
    ({"wire_throttle": {"mbit_per_s": 10, "latency_ms": None}}, "wire_throttle.latency_ms", None),
]


def complaint(params: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        LordoConfig.parse(params)
    return str(caught.value)


def replaced(params: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The settings with the nearest legal value that the message names in place of the illegal one."""
    outer, _, inner = key.partition(".")
    if inner:
        return {**params, outer: {**params[outer], inner: value}}
    if key == "moment_sync_interval" and isinstance(params[key], list) and isinstance(value, int):
        return {**params, key: [params[key][0], value]}
    if key == "betas" and isinstance(value, float):
        return {**params, key: [value, 0.9]}
    return {**params, key: value}


def ids(case: Any) -> str | None:
    return repr(case)[:60] if isinstance(case, dict) else None


@pytest.mark.parametrize(("params", "key", "value"), ILLEGAL, ids=ids)
def test_an_illegal_value_is_answered_in_one_line_with_key_value_rule_and_a_nearest_value_that_is_legal(
    params: dict[str, Any], key: str, value: Any
) -> None:
    message = complaint(params)
    assert "\n" not in message
    assert "optimizer.params" in message and key in message
    shown = (repr(value), json.dumps(value))
    assert any(form in message for form in shown), message
    assert re.search(r"must be|is not legal|not available|needs", message), message
    nearest = re.search(r"\(nearest: (.+)\)$", message)
    assert nearest, f"no nearest legal value: {message}"
    legal = nearest[1] if key == "basis_source" else json.loads(nearest[1])
    if key == "basis_source" and "qh_mode" in params:  # this message names the value of the other key
        LordoConfig.parse({**params, "qh_mode": json.loads(nearest[1])})
    elif key == "basis_source":
        LordoConfig.parse({key: json.loads(legal)})
    else:
        LordoConfig.parse(replaced(params, key, legal))


@pytest.mark.parametrize(
    ("params", "nearest"),
    [
        ({"omega": 1.5}, "1.0"),
        ({"rank": 0}, "1"),
        ({"moment_sync_interval": 33}, "32"),
        ({"moment_sync_interval": 50}, "64"),
        ({"moment_sync_interval": 3}, "32"),
        ({"sync_interval": 1.4}, "1"),
        ({"qh_mode": "facored"}, '"factored"'),
        ({"basis_update": "pwoer"}, '"power"'),
        ({"projection": "glob"}, '"global"'),
        ({"preset": "recomended"}, '"recommended"'),
        ({"error_feedback": True}, '"fp32"'),
        ({"error_feedback": "bf61"}, '"bf16"'),
        ({"replica_size": "nodes"}, '"node"'),
        ({"pseudo_gradient_dtype": "itn4"}, '"int4"'),
        ({"pseudo_gradient_dtype": {"block": 32}}, '{"top_k": 32, "block": 32}'),
        ({"pseudo_gradient_dtype": {"top_k": 9, "block": 8.2}}, '{"top_k": 8, "block": 8}'),
    ],
    ids=ids,
)
def test_the_nearest_legal_value_is_the_one_that_was_probably_meant(params: dict[str, Any], nearest: str) -> None:
    assert complaint(params).endswith(f"(nearest: {nearest})")


@pytest.mark.parametrize(
    ("params", "unknown", "meant"),
    [
        ({"qhmode": "none"}, "qhmode", "qh_mode"),
        ({"omga": 0.5}, "omga", "omega"),
        ({"sync_intervals": 4}, "sync_intervals", "sync_interval"),
        ({"error_feeback": False}, "error_feeback", "error_feedback"),
        ({"outer": {"momentun": 0.5}}, "outer.momentun", "momentum"),
        ({"wire_throttle": {"mbit_per_s": 1, "latency": 5}}, "wire_throttle.latency", "latency_ms"),
        ({"low_rank": {"excludes": []}}, "low_rank.excludes", "exclude"),
        ({"anchor": {"devise": "cpu"}}, "anchor.devise", "device"),
        ({"streaming": {"fragment": 1}}, "streaming.fragment", "fragments"),
        ({"pseudo_gradient_dtype": {"top_k": 8, "blok": 64}}, "pseudo_gradient_dtype.blok", "block"),
        ({"int": 3}, "int", "sync_interval"),  # the name of a type, too, may be a user's key
        ({"outer": {"tuple": 3}}, "outer.tuple", "orthogonalize"),
    ],
    ids=ids,
)
def test_an_unknown_key_is_answered_in_one_line_with_the_key_that_was_meant(
    params: dict[str, Any], unknown: str, meant: str
) -> None:
    message = complaint(params)
    value: Any = params
    for part in unknown.split("."):
        value = value[part]
    assert f"optimizer.params.{unknown} = {value!r} is not a known key" in message
    assert f'did you mean "{meant}"?' in message and "\n" not in message


@pytest.mark.parametrize(
    ("fragments", "delay", "told"),
    [
        (9, 0, "streaming.fragments = 9 must be at most sync_interval = 8"),
        (4, 2, "streaming.delay_steps = 2 must be less than sync_interval / fragments, 8/4"),
        (3, 3, "(nearest: 2)"),
        (1, 8, "(nearest: 7)"),
    ],
)
def test_a_fragment_has_a_step_of_its_own_and_lands_before_the_next_one(fragments: int, delay: int, told: str) -> None:
    params = {"sync_interval": 8, "streaming": {"fragments": fragments, "delay_steps": delay}}
    assert told in complaint(params)
    params["streaming"] = {"fragments": min(8, fragments), "delay_steps": 7 // fragments}
    assert LordoConfig.parse(params).streaming.is_on


def test_streaming_keeps_no_gradient_to_refresh_a_basis_from() -> None:
    message = complaint({"streaming": {"fragments": 2}, "basis_source": "gradient"})
    assert 'basis_source = "gradient" needs the gradient of the step' in message
    LordoConfig.parse({"streaming": {"fragments": 1, "delay_steps": 0}, "basis_source": "gradient"})


# -- defaults, presets, forms --------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_contract() -> None:
    config = LordoConfig.parse({})
    expected = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "rank": 128,
        "sync_interval": 32,
        "moment_sync_intervals": (32, 32),
        "replica_size": 1,
        "projection": "global",
        "preset": "paper",
        "qh_mode": "full_rank",
        "omega": 0.5,
        "error_feedback": False,
        "basis_source": "pseudo_gradient",
        "basis_update": "power",
        "average_dense_moments": False,
        "pseudo_gradient_dtype": "fp32",
        "sync_warmup_steps": 0,
        "wire_throttle": None,
    }
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.outer.is_plain_average and config.anchor.dtype == "fp32"


def test_the_presets_set_their_keys_and_keys_beside_a_preset_win() -> None:
    recommended = LordoConfig.parse({"preset": "recommended"})
    assert (recommended.qh_mode, recommended.omega, recommended.residual_weight) == ("factored", 0.9, 0.25)
    assert recommended.outer == OuterOptimizer(lr=1.0, momentum=0.7, orthogonalize=True, residual_gain=2.0)
    own = LordoConfig.parse({"preset": "recommended", "omega": 0.8, "outer": {"lr": 0.5}, "rank": 3})
    assert (own.omega, own.rank, own.preset, own.residual_weight) == (0.8, 3, "recommended", 0.25)
    assert own.outer == OuterOptimizer(lr=0.5, momentum=0.7, orthogonalize=True, residual_gain=2.0)
    other = LordoConfig.parse({"preset": "recommended", "qh_mode": "none"})
    assert (other.qh_mode, other.omega, other.residual_weight) == ("none", 0.5, None)
    local = LordoConfig.parse({"preset": "recommended", "projection": "local"})
    assert local.outer == OuterOptimizer(lr=1.0, momentum=0.7, orthogonalize=True)
    assert LordoConfig.parse({"preset": "paper"}) == LordoConfig.parse({})
    slow_link = LordoConfig.parse({"preset": "slow_link", "omega": 0.8})
    assert (slow_link.pseudo_gradient_dtype, slow_link.qh_mode, slow_link.omega) == ("int8", "factored", 0.8)
    assert slow_link.outer == recommended.outer and recommended.pseudo_gradient_dtype == "fp32"
    assert set(PRESETS) == {"paper", "recommended", "slow_link"}


def test_an_illegal_key_beside_a_preset_is_named_not_the_presets() -> None:
    assert "omega = 2" in complaint({"preset": "recommended", "omega": 2})


def test_parsing_leaves_the_given_block_alone() -> None:
    params = {"preset": "recommended", "outer": {"lr": 0.5}}
    LordoConfig.parse(params)
    assert params == {"preset": "recommended", "outer": {"lr": 0.5}}
    assert PRESETS["recommended"]["outer"]["lr"] == 1.0


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(None, (8, 8)), (16, (16, 16)), ([8, 24], (8, 24)), ((24, 8), (24, 8)), ("never", (0, 0))],
)
def test_moment_intervals_have_four_forms(interval: Any, expected: tuple[int, int]) -> None:
    config = LordoConfig.parse({"sync_interval": 8, "moment_sync_interval": interval})
    assert config.moment_sync_intervals == expected


@pytest.mark.parametrize(
    ("rank", "side", "expected"),
    [(128, 64, 64), (8, 64, 8), ("1/8", 64, 8), ("1/8", 7, 1), ("1/8", 20, 2), ("1/1", 5, 5), ("3/4", 10, 7)],
)
def test_the_rank_is_a_number_or_a_fraction_of_the_side_and_never_zero(
    rank: int | str, side: int, expected: int
) -> None:
    assert LordoConfig.parse({"rank": rank}).rank_for(side) == expected


@pytest.mark.parametrize("value", [1, 4, "node", "all"])
def test_a_replica_is_a_number_of_ranks_or_a_node_or_all(value: int | str) -> None:
    assert LordoConfig.parse({"replica_size": value}).replica_size == value


@pytest.mark.parametrize("value", ["fp32", "bf16", "int8", "int4"])
def test_a_wire_format_is_a_dtype(value: str) -> None:
    assert LordoConfig.parse({"pseudo_gradient_dtype": value}).pseudo_gradient_dtype == value


def test_a_wire_format_is_some_of_each_block() -> None:
    for given, expected in (({"top_k": 64}, (64, 4096)), ({"top_k": 1, "block": 1}, (1, 1))):
        chosen = LordoConfig.parse({"pseudo_gradient_dtype": given}).pseudo_gradient_dtype
        assert chosen == TopK(top_k=expected[0], block=expected[1])


@pytest.mark.parametrize("value", [False, "bf16", "fp32"])
def test_error_feedback_is_off_or_a_precision(value: Any) -> None:
    assert LordoConfig.parse({"error_feedback": value}).error_feedback == value


@pytest.mark.parametrize(
    ("outer", "plain"),
    [
        ({}, True),
        ({"nesterov": False}, True),
        ({"lr": 0.5}, False),
        ({"momentum": 0.1}, False),
        ({"lr": 1.0, "momentum": 0.0}, True),
        ({"orthogonalize": True}, False),
        ({"residual_gain": 2.0}, False),
    ],
)
def test_plain_averaging_is_an_outer_step_of_one_without_momentum(outer: dict[str, Any], plain: bool) -> None:
    assert LordoConfig.parse({"outer": outer}).outer.is_plain_average == plain


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"preset": "recommended"},
        {"moment_sync_interval": [32, 64], "rank": "1/8", "error_feedback": "bf16"},
        {"low_rank": {"include": ["a"], "exclude": ["b"]}, "anchor": {"device": "cpu", "dtype": "bf16"}},
        {"pseudo_gradient_dtype": {"top_k": 8, "block": 64}},
    ],
    ids=ids,
)
def test_settings_survive_json(params: dict[str, Any]) -> None:
    config = LordoConfig.parse(params)
    assert LordoConfig.parse(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_the_weight_of_the_residual_is_what_omega_leaves_unless_it_is_given() -> None:
    assert LordoConfig.parse({"omega": 0.75}).weight_of_residual == 0.25
    assert LordoConfig.parse({"qh_mode": "factored", "omega": 0.75, "residual_weight": 0.4}).weight_of_residual == 0.4
    assert 'qh_mode = "full_rank": leave it out' in complaint({"residual_weight": 0.4})
    local = complaint({"projection": "local", "outer": {"residual_gain": 2.0}})
    assert "needs one basis for all replicas" in local


def test_settings_cannot_be_changed_afterwards() -> None:
    config = LordoConfig.parse({})
    with pytest.raises(ValidationError):
        config.omega = 0.9  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.outer.lr = 0.9  # type: ignore[misc]
