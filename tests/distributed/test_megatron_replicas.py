"""The block that ends Megatron's data-parallel groups at the replica's edge, and what is refused around it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_patches.versions import MegatronMismatchError
from tests import problems
from tests.gpts import start_megatron
from tests.own_loop import Loop, Weights, forward_toy, optimizer_config, toy_config
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.megatron,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs Megatron on the CPU"),
]


def globals_of_parallel_state() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()}


def inside_and_outside() -> dict[str, Any]:
    from megatron.core import parallel_state as state

    from megatron_patches.ddp import replicas

    start_megatron()
    before, found = globals_of_parallel_state(), {}
    with replicas(2) as mine:
        found["groups"] = [
            dist.get_process_group_ranks(group)
            for group in (
                state.get_data_parallel_group(),
                state.get_data_parallel_group(with_context_parallel=True),
                state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True),
                state.get_expert_data_parallel_group(),
                mine.groups_for_megatron().dp_cp,
            )
        ]
        found["sources"] = (
            state.get_data_parallel_src_rank(),
            state.get_data_parallel_src_rank(with_context_parallel=True),
        )
        found["sampler"] = (state.get_data_parallel_rank(), state.get_data_parallel_world_size())
        found["fields"] = (mine.data_parallel_rank, mine.data_parallel_size)
        with pytest.raises(AssertionError):
            state.get_tensor_and_data_parallel_group()
        with pytest.raises(ValueError, match="entered already"), replicas(2):
            pass
    found["restored"] = globals_of_parallel_state() == before
    with pytest.raises(ZeroDivisionError), replicas(2):
        raise ZeroDivisionError
    found["restored after an exception"] = globals_of_parallel_state() == before
    with pytest.raises(ValueError, match=r"must divide the data-parallel size 4 \(nearest: 2\)"), replicas(3):
        pass
    found["restored after a refusal"] = globals_of_parallel_state() == before
    with replicas("all") as mine:
        found["all"] = mine.ranks
    return found


def test_groups_are_the_replicas_and_samplers_are_told_all_ranks() -> None:
    for rank, found in enumerate(run_ranks(inside_and_outside, 4)):
        ranks = [0, 1] if rank < 2 else [2, 3]
        assert found["groups"] == [ranks] * 5
        assert found["sources"] == (ranks[0], ranks[0])
        assert found["sampler"] == found["fields"] == (rank, 4)
        assert found["all"] == (0, 1, 2, 3)
        assert found["restored"] and found["restored after an exception"] and found["restored after a refusal"]


def strange_megatrons() -> list[str]:
    from megatron.core import parallel_state as state

    from megatron_patches import ddp

    start_megatron()
    before, told = globals_of_parallel_state(), []

    def refused() -> None:
        with pytest.raises(MegatronMismatchError) as error, ddp.replicas(1):
            pass
        told.append(str(error.value))
        assert globals_of_parallel_state() == before

    with patch.object(state, "get_data_parallel_group", lambda with_context_parallel=False: None):
        refused()
    with patch.object(ddp, "_NONE", ("_A_GROUP_OF_THE_FUTURE",)):
        refused()
    group = state.get_data_parallel_group()
    with patch.object(
        state,
        "get_data_parallel_group",
        lambda with_context_parallel=False, partial_data_parallel=False, independent_all_gather=False: group,
    ):
        refused()
    with pytest.raises(MegatronMismatchError) as error, ddp.replicas(1):
        state._DATA_PARALLEL_GROUP = None
    told.append(str(error.value))
    return told


def test_another_megatron_is_refused_and_nothing_is_left_changed() -> None:
    for told in run_ranks(strange_megatrons, 2):
        assert "get_data_parallel_group takes (with_context_parallel)" in told[0]
        assert "_A_GROUP_OF_THE_FUTURE does not exist" in told[1]
        assert "does not tell the group that was set" in told[2]
        assert "_DATA_PARALLEL_GROUP was set by somebody else" in told[3]


def refusals() -> dict[str, str]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    from megatron_patches.ddp import replicas
    from megatron_patches.optimizer import lordo_optimizer

    start_megatron()
    found = {}

    def build(inside: bool = True, ddp: Any = None, model: Any = None) -> tuple[Any, Any]:
        config = toy_config(**(model or {}))
        ddp_config = DistributedDataParallelConfig(**(ddp or {}))
        with replicas(1) as mine:
            chunk = DistributedDataParallel(config, ddp_config, Weights(config, torch.float32)) if inside else None
        return chunk or DistributedDataParallel(config, ddp_config, Weights(config, torch.float32)), mine

    def refuse(name: str, attempt: Callable[[], Any]) -> None:
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)) as error:
            attempt()
        found[name] = str(error.value)

    def optimize(built: Any, settings: Any = None, chunks: Any = None, **config: Any) -> Any:
        chunk, mine = built
        return lordo_optimizer(chunks or [chunk], settings or {"rank": 2}, optimizer_config(**config), mine)

    good = build()
    refuse("outside", lambda: optimize(build(inside=False)))
    refuse("distributed", lambda: optimize(good, use_distributed_optimizer=True))
    refuse("distributed ddp", lambda: optimize(build(ddp={"use_distributed_optimizer": True})))
    refuse("chunks", lambda: optimize(good, chunks=[good[0], good[0]]))
    refuse("unwrapped", lambda: optimize(good, chunks=[good[0].module]))
    refuse("lr twice", lambda: optimize(good, {"lr": 1e-3}))
    refuse("no lr", lambda: optimize(good, lr=None))
    refuse("replica size twice", lambda: optimize(good, {"replica_size": 2}))
    refuse("unknown key", lambda: optimize(good, {"rnak": 2}))
    refuse("offload", lambda: optimize(good, optimizer_cpu_offload=True))
    refuse("coupled decay", lambda: optimize(good, decoupled_weight_decay=False))
    experts = build()
    experts[0].module.config.num_moe_experts = 4
    refuse("experts", lambda: optimize(experts))
    expert = build()
    expert[0].module.tall.allreduce = False
    refuse("an expert", lambda: optimize(expert))
    optimizer = optimize(good)
    refuse("chained", lambda: ChainedOptimizer([optimizer]).step())
    refuse("sharded checkpoint", lambda: optimizer.sharded_state_dict({}))
    return found


def test_what_is_not_supported_is_refused_in_one_line_that_says_what_to_do() -> None:
    rules = {
        "outside": "over the ranks (0, 1)",
        "distributed": "set use_distributed_optimizer to False",
        "distributed ddp": "set use_distributed_optimizer to False",
        "chunks": "use one per rank",
        "unwrapped": "DistributedDataParallel",
        "lr twice": "give lr in Megatron's OptimizerConfig",
        "no lr": "OptimizerConfig.lr is None: set it",
        "replica size twice": "replicas of 1",
        "unknown key": "rank",
        "offload": "optimizer_cpu_offload is not supported",
        "coupled decay": "decoupled_weight_decay",
        "experts": "train a dense model",
        "an expert": "tall is an expert's",
        "chained": "not of a ChainedOptimizer",
        "sharded checkpoint": "one file per rank",
    }
    for found in run_ranks(refusals, 2):
        assert found.keys() == rules.keys()
        for name, words in rules.items():
            assert words in found[name] and "\n" not in found[name], f"{name}: {found[name]}"


def groups_of_parameters() -> tuple[list[Any], list[Any]]:
    start_megatron()
    loop = Loop.of_toys(weight_decay=0.5, overrides=None)
    groups = [(g["lr"], g["weight_decay"], g["wd_mult"], len(g["params"])) for g in loop.optimizer.param_groups]
    status = loop.optimizer.handle.status()
    return groups, [status[key] for key in ("replicas", "shard_size", "low_rank_parameters", "dense_parameters")]


def test_parameter_groups_are_megatrons() -> None:
    for groups, status in run_ranks(groups_of_parameters, 2):
        assert sorted(groups) == [(1e-2, 0.0, 0.0, 1), (1e-2, 0.5, 1.0, 5)], "no decay for biases"
        assert status == [2, 1, 5, 1]


def start_from_different_weights() -> dict[str, torch.Tensor]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_patches.ddp import replicas
    from megatron_patches.optimizer import lordo_optimizer

    start_megatron()
    config = toy_config()
    module = Weights(config, torch.bfloat16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(dist.get_rank())
    module.tall.requires_grad_(False)
    with replicas(2) as mine:
        chunk = DistributedDataParallel(config, DistributedDataParallelConfig(), module)
    lordo_optimizer([chunk], {"rank": 2}, optimizer_config(torch.bfloat16), mine)
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_all_ranks_start_from_the_first_ones_weights_frozen_ones_included() -> None:
    expected = problems.initial_weights(torch.bfloat16)
    for weights in run_ranks(start_from_different_weights, 4):
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


def warnings_about_samples(sampler_rank: str) -> list[str]:
    from tests.problems import gradients

    start_megatron()
    loop, told = Loop.of_toys(), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lordo_ds").addHandler(handler)
    mine = loop.mine
    rank = {"all": mine.data_parallel_rank, "replica": dist.get_rank(mine.groups.shard)}[sampler_rank]
    forward = loop.module.forward
    loop.module.forward = lambda batch, tokens: forward(batch)  # type: ignore[method-assign]

    def forward_step(batches: Any, model: Any) -> Any:
        batch = next(batches)
        output = model(batch, tokens=torch.arange(8) + 100 * rank)
        return output, forward_toy(iter([batch]), lambda _: output)[1]

    for step in range(1, 7):
        loop.step([gradients(step, dist.get_rank(), torch.float32)], forward_step)
    return told


def test_replicas_that_read_the_same_samples_are_told_so_once() -> None:
    assert run_ranks(warnings_about_samples, 2, "all") == [[], []]
    for told in run_ranks(warnings_about_samples, 2, "replica"):
        assert len(told) == 1 and "replicas [0, 1] were given the same first samples" in told[0]
