"""A stale configuration on one node: it trained to the end without a word, or hung. Now all ranks refuse, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lordo_ds import ConfigError, LoRDO
from lordo_ds.sync import alike
from tests import engines
from tests.ranks import run_ranks


def said(start: Callable[[], Any]) -> str:
    """The refusal, empty if there was none."""
    try:
        start()
    except ConfigError as error:
        return str(error)
    return ""


def check_same_everywhere(found: list[dict[str, str]], expected: dict[str, tuple[str, ...]]) -> None:
    for case, parts in expected.items():
        for rank, messages in enumerate(found):
            message = messages[case]
            assert all(part in message for part in parts) if parts else not message, f"{case}, rank {rank}: {message!r}"
            assert message == found[0][case], f"{case}: rank {rank} says something else"
            assert "\n" not in message


# -- alone -------------------------------------------------------------------------------------------

ALONE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "same": ({}, ()),
    "lr": ({"lr": 2e-3}, ("lr is 0.001 on ranks 0, 1 and 0.002 on rank 2",)),
    "weight decay": ({"weight_decay": 0.1}, ("weight_decay is 0.0 on", "0.1 on rank 2")),
    "qh_mode": ({"qh_mode": "factored"}, ("qh_mode is 'full_rank'", "'factored' on rank 2")),
    "error_feedback": ({"error_feedback": "bf16"}, ("error_feedback",)),
    "min_participants": ({"min_participants": 2}, ("min_participants",)),
    "sync_interval": ({"sync_interval": 4}, ("sync_interval is 2", "4 on rank 2")),
    "wire dtype": ({"pseudo_gradient_dtype": "bf16"}, ("pseudo_gradient_dtype",)),
    "moment interval": ({"moment_sync_interval": "never"}, ("moment_sync_interval",)),
    "outer momentum": ({"outer": {"momentum": 0.5}}, ("outer.momentum is 0.0", "0.5 on rank 2")),
    "what may differ": ({"sync_timeout_s": 60.0, "anchor": {"device": "cpu"}}, ()),
    "another link": ({"wire_throttle": {"mbit_per_s": 1e6}}, ()),
}


def odd_settings_alone() -> dict[str, str]:
    found = {}
    for case, (odd, _) in ALONE.items():
        settings = {"rank": 2, "sync_interval": 2, **(odd if dist.get_rank() == 2 else {})}
        optimizer = LoRDO([("a.weight", nn.Parameter(torch.ones(4, 6)))], **settings)
        found[case] = said(optimizer._attach_alone)
        optimizer.watchdog.stop()
    return found


@pytest.mark.distributed
def test_settings_that_differ_are_named_on_all_ranks() -> None:
    found = run_ranks(odd_settings_alone, 3, timeout_s=60)
    check_same_everywhere(found, {case: parts for case, (_, parts) in ALONE.items()})


def odd_parameters_alone() -> dict[str, str]:
    odd = dist.get_rank() == 1

    def named(*more: tuple[str, int], dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
        layers = [("a", 6), ("b", 6), *more]
        return [(name, nn.Parameter(torch.ones(4, width, dtype=dtype))) for name, width in layers]

    three = named(("c", 6))
    apart = [{"params": three[:1]}, {"params": three[1:], "weight_decay": 0.1}]
    cases: dict[str, tuple[Any, Any]] = {
        "shape": (named(), [named()[0], ("b", nn.Parameter(torch.ones(4, 8)))]),
        "order": (named(), named()[::-1]),
        "extra": (named(), named(("c", 6))),
        "dtype": (named(), named(dtype=torch.float64)),
        "group": (apart, [apart[0], {**apart[1], "weight_decay": torch.tensor(0.2)}]),
        "membership": (apart, [{"params": three[:2]}, {**apart[1], "params": three[2:]}]),
        "frozen": (named(), [named()[0], ("b", nn.Parameter(torch.ones(4, 6), requires_grad=False))]),
    }
    found = {}
    for case, each in cases.items():
        optimizer = LoRDO(each[odd], rank=2, sync_interval=2)
        found[case] = said(optimizer._attach_alone)
        optimizer.watchdog.stop()
    return found


@pytest.mark.distributed
def test_parameters_and_groups_that_differ_are_named_on_all_ranks() -> None:
    expected = {
        "shape": ("parameter 1 of group 0 is b (4, 6) float32 on rank 0 and b (4, 8) float32 on rank 1",),
        "order": ("parameter 0 of group 0 is a (4, 6) float32 on rank 0 and b (4, 6) float32 on rank 1",),
        "extra": ("parameter 2 of group 0 is nothing on rank 0 and c (4, 6) float32 on rank 1",),
        "dtype": ("a (4, 6) float32 on rank 0 and a (4, 6) float64 on rank 1",),
        "group": ("weight_decay of parameter group 1 is 0.1 on rank 0 and 0.2",),
        "membership": ("parameter 1 of group 0 is nothing on rank 0 and b (4, 6)",),
        "frozen": ("b (4, 6) float32, frozen on rank 1",),
    }
    check_same_everywhere(run_ranks(odd_parameters_alone, 2, timeout_s=60), expected)


# -- versions and refusals ---------------------------------------------------------------------------


def odd_versions() -> dict[str, str]:
    odd = dist.get_rank() == 1
    found = {}
    for case in ("torch", "a refusal", "Python", "another program"):
        start = alike.Start({"the version of torch": "2.13.0+cpu"}, warned={"the version of Python": "3.11"})
        if odd and case == "torch":
            start = alike.Start({"the version of torch": "2.12.1+cpu"}, warned=start.warned)
        elif odd and case == "a refusal":
            start = alike.Start(refusal="LoRDO: nothing works here: go home")
        elif odd and case == "Python":
            start = alike.Start(start.everywhere, warned={"the version of Python": "3.10"})
        elif odd and case == "another program":
            found[case] = "LoRDO: rank 1 run another version of lordo_ds: install the same on all ranks"
            dist.all_gather_object([None, None], 7)
            continue
        found[case] = said(lambda start=start: alike.require_alike(start))
    return found


@pytest.mark.distributed
def test_versions_that_differ_stop_all_ranks_and_a_refusal_of_one_rank_is_everybodys() -> None:
    expected = {
        "torch": ("the version of torch is 2.13.0+cpu on rank 0 and 2.12.1+cpu on rank 1",),
        "a refusal": ("LoRDO: nothing works here: go home (so on rank 1 only)",),
        "Python": (),
        "another program": ("rank 1 run another version of lordo_ds",),
    }
    check_same_everywhere(run_ranks(odd_versions, 2, timeout_s=60), expected)


# -- DeepSpeed's engine ------------------------------------------------------------------------------

ENGINE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "lr": ({"optimizer": {"lr": 2e-2}}, ("optimizer.params.lr is 0.01 on rank 0 and 0.02 on rank 1",)),
    "replica_size": ({"optimizer": {"replica_size": 2}}, ("optimizer.params.replica_size is 1 on rank 0 and 2",)),
    "illegal": ({"optimizer": {"rank": 0}}, ("optimizer.params.rank = 0 must be", "(so on rank 1 only)")),
    "unsupported": ({"hybrid_engine": {"enabled": True}}, ("hybrid_engine is not supported", "on rank 1 only")),
    "clipping": ({"gradient_clipping": 1.0}, ("gradient_clipping is 0.0 on rank 0 and 1.0 on rank 1",)),
    "micro-batch": (
        {"train_micro_batch_size_per_gpu": 2},
        ("train_micro_batch_size_per_gpu is 1 on rank 0 and 2 on rank 1",),
    ),
    "accumulation": ({"gradient_accumulation_steps": 2}, ("gradient_accumulation_steps is 1 on rank 0 and 2",)),
    "ZeRO stage": ({"zero_optimization": {"stage": 1}}, ("zero_optimization.stage is 0 on rank 0 and 1 on rank 1",)),
    "precision": ({"bf16": {"enabled": True}}, ("bf16.enabled is False on rank 0 and True on rank 1",)),
    "scheduler": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
        ("scheduler.name is None on rank 0 and 'WarmupLR' on rank 1",),
    ),
}


def odd_engine_settings() -> dict[str, str]:
    found = {}
    for case, (odd, _) in ENGINE.items():
        config = engines.settings(**copy.deepcopy(odd)) if dist.get_rank() == 1 else engines.settings()
        found[case] = said(lambda config=config: engines.make_engine(config))
    # What a rank shows and logs is its own affair.
    config = engines.settings(steps_per_print=dist.get_rank() + 1, wall_clock_breakdown=bool(dist.get_rank()))
    engine = engines.make_engine(config)
    engines.train_step(engine, 1)
    engine.destroy()

    model = engines.GivenGradients()
    groups = [{"params": [model.tall, model.long]}, {"params": [model.wide, model.square, model.small, model.bias]}]
    groups[dist.get_rank()]["weight_decay"] = 0.5
    found["groups"] = said(lambda: engines.make_engine(engines.settings(), model, model_parameters=groups))
    model = engines.GivenGradients()
    if dist.get_rank():
        model.register_buffer("extra", torch.ones(3))
    found["buffer"] = said(lambda: engines.make_engine(engines.settings(), model))
    return found


@pytest.mark.distributed
@pytest.mark.deepspeed
def test_configurations_of_deepspeed_that_differ_are_named_on_all_ranks() -> None:
    expected = {case: parts for case, (_, parts) in ENGINE.items()}
    expected["groups"] = ("weight_decay of parameter group 0 is 0.5 on rank 0 and nothing on rank 1",)
    expected["buffer"] = ("untrained tensor 0 is nothing on rank 0 and extra (3,) float32 on rank 1",)
    check_same_everywhere(run_ranks(odd_engine_settings, 2, timeout_s=120), expected)


def test_nothing_is_exchanged_but_one_digest_where_all_are_alike() -> None:
    """Texts of a model of ten thousand parameters, in one object of a few hundred bytes."""
    sent: list[Any] = []

    def of_all(value: Any) -> list[Any]:
        sent.append(value)
        return [value] * 4

    names = {f"layer.{i}.weight": nn.Parameter(torch.empty(2, 2, device="meta")) for i in range(10_000)}
    texts = alike.parameter_texts([{"params": list(names.values())}], {id(p): name for name, p in names.items()})
    alike.require_alike(alike.Start({"optimizer.params.lr": "0.001"}, texts), of_all)
    assert len(sent) == 1 and len(repr(sent[0])) < 400


# -- pipelines, and Megatron's own loop --------------------------------------------------------------


def odd_stages() -> dict[str, str]:
    """Two stages of two replicas: stages hold other layers by right, replicas must not."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    def make(width: int, momentum: float = 0.0) -> Any:
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, width), nn.Tanh()]
        model = PipelineModule(layers=layers, num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform")
        return engines.make_engine(engines.settings(optimizer={"outer": {"momentum": momentum}}), model)

    odd = dist.get_rank() == 3
    make(8).destroy()
    return {"layer": said(lambda: make(8 + odd)), "setting": said(lambda: make(8, 0.5 * odd))}


@pytest.mark.distributed
@pytest.mark.deepspeed
def test_stages_are_compared_across_replicas() -> None:
    expected = {
        "layer": ("parameter 0 of group 0 is 2.weight (8, 8) float32 on rank 2 and 2.weight (9, 8) float32 on rank 3",),
        "setting": ("optimizer.params.outer.momentum is 0.0 on ranks 0, 1, 2 and 0.5 on rank 3",),
    }
    check_same_everywhere(run_ranks(odd_stages, 4, timeout_s=120), expected)


def odd_in_megatron() -> dict[str, str]:
    from tests.gpts import start_megatron
    from tests.own_loop import Loop

    start_megatron()
    odd = dist.get_rank() == 1
    cases: dict[str, dict[str, Any]] = {
        "replica_size": {"replica_size": 1 + odd},
        "setting": {"settings": {"qh_mode": "factored" if odd else "full_rank"}},
        "illegal": {"settings": {"rank": 3 * (not odd)}},
        "lr": {"lr": 0.02 if odd else 0.01},
        "clipping": {"clip_grad": 1.0 + odd},
        "dtype": {"dtype": torch.bfloat16 if odd else torch.float32},
    }
    return {name: said(lambda case=case: Loop.of_toys(**case)) for name, case in cases.items()}


@pytest.mark.distributed
@pytest.mark.megatron
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Megatron on the CPU")
def test_megatrons_own_loop_is_compared_too() -> None:
    expected = {
        "replica_size": ("replica_size is 1 on rank 0 and 2 on rank 1",),
        "setting": ("qh_mode is 'full_rank' on rank 0 and 'factored' on rank 1",),
        "illegal": ("rank = 0 must be", "(so on rank 1 only)"),
        "lr": ("lr is 0.01 on rank 0 and 0.02 on rank 1",),
        "clipping": ("OptimizerConfig.clip_grad is 1.0 on rank 0 and 2.0 on rank 1",),
        "dtype": ("OptimizerConfig.bf16 is False on rank 0 and True on rank 1",),
    }
    check_same_everywhere(run_ranks(odd_in_megatron, 2, timeout_s=120), expected)
