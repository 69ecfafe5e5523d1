"""Where each wrapper keeps each parameter: ids written into the weights are found where `flat_tensors` says.

Every element of the model gets a bit pattern of its own, exact in the precision that trains, so a wrong slice, a wrong
order or an element held twice cannot go unseen.
"""

from __future__ import annotations

import copy
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lordo_ds.adapters.deepspeed.masters import refresh_low_precision
from lordo_ds.adapters.deepspeed.wrappers import flat_tensors, gradient_bytes, is_offloaded
from lordo_ds.core.grouping import model_facts
from lordo_ds.optimizer import LoRDO
from tests.cases import Found, once, run_cases
from tests.engines import LORDO, make_engine, settings
from tests.ranks import RankFailedError, run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]

# The bits of an integer type of the same width, from the first normal number used on.
PATTERNS = {"bf16": (torch.int16, 0x3000), "fp16": (torch.int16, 0x1000), "fp32": (torch.int32, 0x40000000)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class OddShapes(nn.Module):
    """Sides that no shard count divides, a matrix smaller than a shard and one larger, a tied and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.tiny = nn.Linear(2, 3, bias=False)
        self.frozen = nn.Linear(5, 3)
        self.wide = nn.Linear(37, 13)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.scale = nn.Parameter(torch.ones(1))
        self.tall = nn.Linear(3, 41, bias=False)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = (
            self.tiny(x[:, :2]).sum() + self.wide(x).sum() + self.tall(x[:, :3]).sum() + self.frozen(x[:, :5]).sum()
        )
        return (self.head(self.embed.weight).sum() + hidden) * self.scale.sum()


def numbered(dtype: str) -> tuple[OddShapes, dict[str, int]]:
    """The model with a number in every element, and the first number of each parameter."""
    integer, first = PATTERNS[dtype]
    model, starts, position = OddShapes(), {}, first
    for name, parameter in model.named_parameters():
        starts[name] = position
        bits = torch.arange(position, position + parameter.numel(), dtype=integer)
        parameter.data = bits.view(DTYPES[dtype]).float().view(parameter.shape)
        position += parameter.numel()
    return model, starts


def numbers(values: Tensor, dtype: str) -> list[int]:
    return values.detach().to(DTYPES[dtype]).view(PATTERNS[dtype][0]).tolist()


def build(case: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """An engine over the numbered model; every rank of the world is a shard."""
    case = copy.deepcopy(case)
    dtype = case.pop("dtype", "fp32")
    groups = case.pop("groups", False)
    model, starts = numbered(dtype)
    config = settings(dtype, {"replica_size": "all"}, **case)
    given: dict[str, Any] = {}
    if groups:  # matrices and the rest apart, as where decay is for matrices only
        matrices = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() != 2]
        given["model_parameters"] = [{"params": matrices}, {"params": others, "weight_decay": 0.0, "lr": 1e-3}]
    return make_engine(config, model, **given), starts


def layout(case: dict[str, Any]) -> dict[str, Any]:
    engine, starts = build(case)
    dtype = case.get("dtype", "fp32")
    flats = flat_tensors(engine, model_facts(engine.module))
    rank = dist.get_rank() if flats[0].pieces[0].intervals[1:] else 0
    found = []
    for flat in flats:
        assert flat.tensor.dtype == torch.float32 and flat.tensor.is_contiguous()
        pieces = []
        for piece in flat.pieces:
            start, stop = piece.intervals[rank]
            held = flat.tensor.view(-1)[piece.offset : piece.offset + stop - start]
            pieces.append((piece.facts.name, piece.facts.shape, piece.intervals, numbers(held, dtype)))
        found.append(pieces)
    facts = {
        "wrapper": type(engine.optimizer).__name__,
        "flats": found,
        "starts": starts,
        "offloaded": is_offloaded(engine),
        "gradient_bytes": gradient_bytes(engine),
    }
    engine.destroy()
    return facts


ZERO3_SMALL = {"stage": 3, "stage3_param_persistence_threshold": 0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "stage 0 fp32": ("LoRDO", {}),
    "stage 0 bf16": ("FP16_UnfusedOptimizer", {"dtype": "bf16"}),
    "stage 0 fp16, groups": ("FP16_UnfusedOptimizer", {"dtype": "fp16", "groups": True}),
    "stage 1 fp32": ("DeepSpeedZeroOptimizer", {"zero_optimization": {"stage": 1}}),
    "stage 1 fp16": ("DeepSpeedZeroOptimizer", {"dtype": "fp16", "zero_optimization": {"stage": 1}}),
    "stage 1 bf16": ("DeepSpeedZeroOptimizer", {"dtype": "bf16", "zero_optimization": {"stage": 1}}),
    "stage 1 bf16, fp32 accumulation": (
        "BF16_Optimizer",
        {"dtype": "bf16", "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}},
    ),
    "stage 1 bf16, fp32 accumulation, groups": (
        "BF16_Optimizer",
        {
            "dtype": "bf16",
            "groups": True,
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 1},
        },
    ),
    "stage 1 bf16, offloaded": (
        "DeepSpeedZeroOptimizer",
        {"dtype": "bf16", "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
    ),
    "stage 2 fp32": ("DeepSpeedZeroOptimizer", {"zero_optimization": {"stage": 2}}),
    "stage 2 bf16, groups": (
        "DeepSpeedZeroOptimizer",
        {"dtype": "bf16", "groups": True, "zero_optimization": {"stage": 2}},
    ),
    "stage 2 fp32, round robin": (
        "DeepSpeedZeroOptimizer",
        {"groups": True, "zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    ),
    "stage 2 fp16, aligned, round robin": (
        "DeepSpeedZeroOptimizer",
        {
            "dtype": "fp16",
            "zero_optimization": {"stage": 2, "round_robin_gradients": True, "parameter_alignment": True},
        },
    ),
    "stage 2 bf16, aligned, offloaded": (
        "DeepSpeedZeroOptimizer",
        {
            "dtype": "bf16",
            "groups": True,
            "zero_optimization": {
                "stage": 2,
                "parameter_alignment": True,
                "offload_optimizer": {"device": "cpu", "pin_memory": False},
            },
        },
    ),
    "stage 3 fp32": ("DeepSpeedZeroOptimizer_Stage3", {"zero_optimization": ZERO3_SMALL}),
    "stage 3 bf16, groups": (
        "DeepSpeedZeroOptimizer_Stage3",
        {"dtype": "bf16", "groups": True, "zero_optimization": ZERO3_SMALL},
    ),
    "stage 3 fp32, sub-groups": (
        "DeepSpeedZeroOptimizer_Stage3",
        {"groups": True, "zero_optimization": {**ZERO3_SMALL, "sub_group_size": 60}},
    ),
    "stage 3 fp16, persistent, sub-groups": (
        "DeepSpeedZeroOptimizer_Stage3",
        {
            "dtype": "fp16",
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100, "sub_group_size": 30},
        },
    ),
    "stage 3 bf16, offloaded": (
        "DeepSpeedZeroOptimizer_Stage3",
        {
            "dtype": "bf16",
            "zero_optimization": {
                "stage": 3,
                "sub_group_size": 60,
                "offload_optimizer": {"device": "cpu", "pin_memory": False},
            },
        },
    ),
    "stage 3 fp32, parameters offloaded too": (
        "DeepSpeedZeroOptimizer_Stage3",
        {
            "zero_optimization": {
                **ZERO3_SMALL,
                "offload_optimizer": {"device": "cpu", "pin_memory": False},
                "offload_param": {"device": "cpu", "pin_memory": False},
            }
        },
    ),
}


@once
def of_all_cases(what: str, shards: int) -> Found[str]:
    function = {"layout": layout, "refreshed": refreshed}[what]
    return run_cases(function, shards, {case: (keys,) for case, (_, keys) in CASES.items()}, timeout_s=240)


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("case", list(CASES))
def test_every_element_is_where_the_layout_says_and_in_one_place_only(case: str, shards: int) -> None:
    wrapper, keys = CASES[case]
    ranks = of_all_cases("layout", shards)[case]
    model = OddShapes()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    held: dict[str, list[int]] = {name: [] for name in trainable}
    whole = "stage 0" in case
    for rank, found in enumerate(ranks):
        assert found["wrapper"] == wrapper
        assert found["offloaded"] == ("offloaded" in case)
        width = 4 if keys.get("dtype", "fp32") == "fp32" else 2
        assert found["gradient_bytes"] == width * sum(p.numel() for p in trainable.values())
        for flat, of_first_rank in zip(found["flats"], ranks[0]["flats"], strict=True):
            # One canonical order, the parameters included that this rank holds nothing of.
            assert [piece[:3] for piece in flat] == [piece[:3] for piece in of_first_rank]
            for name, shape, intervals, content in flat:
                assert shape == tuple(trainable[name].shape)
                start, stop = intervals[0 if whole else rank]
                first = found["starts"][name]
                assert content == list(range(first + start, first + stop)), f"rank {rank}, {name}"
                if rank == 0 or not whole:
                    held[name] += content
    for name, parameter in trainable.items():
        first = ranks[0]["starts"][name]
        assert sorted(held[name]) == list(range(first, first + parameter.numel())), name
    if not whole and "stage 3" not in case:
        spans = [i for f in ranks[0]["flats"] for p in f if p[0] == "wide.weight" for i in p[2]]
        assert sum(stop > start for start, stop in spans) >= 2, "the large matrix should lie on several shards"


def test_a_matrix_can_straddle_three_shards_and_a_small_one_lie_within_one() -> None:
    found = of_all_cases("layout", 3)["stage 1 fp32"][0]["flats"]
    held = {p[0]: sum(stop > start for start, stop in p[2]) for flat in found for p in flat}
    assert held["wide.weight"] == 3 and held["tiny.weight"] == 1


# -- the low-precision copy --------------------------------------------------------------------------


def refreshed(case: dict[str, Any]) -> list[str]:
    """Names of parameters that do not hold, whole, what the stepped tensors were changed to."""
    engine, starts = build(case)
    dtype = DTYPES[case.get("dtype", "fp32")]
    flats = flat_tensors(engine, model_facts(engine.module))
    rank = dist.get_rank() if flats[0].pieces[0].intervals[1:] else 0
    for flat in flats:
        for piece in flat.pieces:
            start, stop = piece.intervals[rank]
            offset = float(sum(map(ord, piece.facts.name)) % 97)
            values = (torch.arange(start, stop) % 251).float() + offset
            flat.tensor.data.view(-1)[piece.offset : piece.offset + stop - start] = values
    persistent = [p for p in engine.module.parameters() if getattr(p, "ds_persist", False)]
    if persistent:  # as after a forward pass: before the first, none is gathered, and a refresh leaves it so
        persistent[0].all_gather(persistent)
    refresh_low_precision(engine)
    assert all(p.numel() == p.ds_numel for p in persistent), "persistent parameters stay gathered"
    wrong = []
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.detach().float().flatten()
        if not parameter.requires_grad:
            integer, _ = PATTERNS[case.get("dtype", "fp32")]
            bits = torch.arange(starts[name], starts[name] + whole.numel(), dtype=integer)
            expected = bits.view(dtype).float()
        else:
            offset = float(sum(map(ord, name)) % 97)
            expected = ((torch.arange(whole.numel()) % 251).float() + offset).to(dtype).float()
        if not torch.equal(whole, expected):
            wrong.append(name)
    flat_tensors(engine, model_facts(engine.module))  # its own check: both copies agree
    engine.destroy()
    return wrong


@pytest.mark.parametrize("case", list(CASES))
def test_refreshing_gives_the_model_what_the_stepped_tensors_hold(case: str) -> None:
    assert of_all_cases("refreshed", 2)[case] == [[], []]


# -- refusals ----------------------------------------------------------------------------------------


def a_weight_moved() -> None:
    engine, _ = build({"zero_optimization": {"stage": 1}})
    engine.optimizer.round_robin_bit16_offsets[0][1] += 1
    flat_tensors(engine, model_facts(engine.module))


def test_a_layout_that_deepspeed_changed_is_noticed_by_the_parameters_name() -> None:
    with pytest.raises(RankFailedError, match=r"LoRDO: \w+.weight.* DeepSpeed keeps it elsewhere") as caught:
        run_ranks(a_weight_moved, 2)
    assert caught.value.error_type == "RuntimeError"


class OtherWrapper:
    """Stands for a wrapper of a later DeepSpeed."""


def another_wrapper() -> None:
    engine, _ = build({})
    engine.optimizer = OtherWrapper()
    flat_tensors(engine, model_facts(engine.module))


def test_an_unknown_wrapper_is_refused_by_its_name() -> None:
    with pytest.raises(RankFailedError, match="wraps the optimizer in OtherWrapper, which is not supported") as caught:
        run_ranks(another_wrapper, 1)
    assert caught.value.error_type == "ConfigError"


def a_parameter_from_elsewhere() -> None:
    model = OddShapes()
    config = settings()
    del config["optimizer"]
    optimizer = LoRDO([*model.parameters(), nn.Parameter(torch.ones(3, 3))], **LORDO)
    make_engine(config, model, optimizer=optimizer)


def test_a_parameter_outside_the_model_is_refused() -> None:
    with pytest.raises(RankFailedError, match=r"a parameter \(3, 3\) that is not part of the model"):
        run_ranks(a_parameter_from_elsewhere, 1)


def client_optimizer_offloaded(stage: int) -> str:
    config = settings(zero_optimization={"stage": stage, "offload_optimizer": {"device": "cpu", "pin_memory": False}})
    del config["optimizer"]
    model = OddShapes()
    engine = make_engine(config, model, optimizer=LoRDO(model.parameters(), **LORDO))
    return type(engine.basic_optimizer).__name__


@pytest.mark.parametrize("stage", [2, 3])
def test_a_lordo_object_can_be_offloaded_like_one_from_the_json(stage: int) -> None:
    assert run_ranks(client_optimizer_offloaded, 1, stage) == ["LoRDO"]
