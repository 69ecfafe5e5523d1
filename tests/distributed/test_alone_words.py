"""Messages name what there is: without an engine no engine, no JSON and no path in one."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lordo_ds
from lordo_ds import LoRDO
from lordo_ds.adapters.deepspeed.registration import build_for_engine
from tests.ranks import run_ranks

SETTINGS: dict[str, Any] = {"lr": 1e-2, "rank": 2, "sync_interval": 2}
FOREIGN = ("optimizer.params", "engine", "JSON", "deepspeed", "DeepSpeed", "ZeRO", "reshape")


def named() -> list[tuple[str, torch.nn.Parameter]]:
    return [("a.weight", torch.nn.Parameter(torch.ones(6, 8))), ("wte.weight", torch.nn.Parameter(torch.ones(6, 8)))]


def started(**settings: Any) -> LoRDO:
    optimizer = LoRDO(named(), **{**SETTINGS, **settings})
    for step in range(3):
        for parameter in optimizer.param_groups[0]["params"]:
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            parameter.grad = torch.randn(6, 8, generator=generator)
        optimizer.step()
    return optimizer


SETTING: dict[str, tuple[dict[str, Any], str]] = {
    "value": ({"rank": 0}, "rank = 0 must be >= 1"),
    "key": ({"rnak": 8}, 'rnak = 8 is not a known key: did you mean "rank"?'),
    "inner key": ({"outer": {"lr": -1}}, "outer.lr = -1 must be > 0"),
    "rule": ({"moment_sync_interval": 3}, "moment_sync_interval = 3 must be a multiple of sync_interval"),
    "field": ({"rank": "2"}, "rank = '2' must be an int"),
}


@pytest.mark.parametrize("case", SETTING)
def test_a_wrong_keyword_is_called_by_its_name(case: str) -> None:
    settings, words = SETTING[case]
    with pytest.raises(lordo_ds.ConfigError) as refused:
        LoRDO(named(), **{**SETTINGS, **settings})
    assert str(refused.value).startswith(f"LoRDO: {words}")
    assert not any(word in str(refused.value) for word in FOREIGN)
    with pytest.raises(lordo_ds.ConfigError, match=r"LoRDO: optimizer\.params"):
        lordo_ds.LordoConfig.parse({**SETTINGS, **settings})


def test_the_block_of_a_configuration_keeps_its_path() -> None:
    assert build_for_engine(named(), **SETTINGS).config.key("rank") == "optimizer.params.rank"


def of_other_replica() -> Any:
    states: list[Any] = [None, None]
    dist.all_gather_object(states, started().state_dict())
    LoRDO(named(), **SETTINGS).load_state_dict(states[1 - dist.get_rank()])


def of_other_settings(**settings: Any) -> Callable[[], Any]:
    return lambda: LoRDO(named(), **{**SETTINGS, **settings}).load_state_dict(started().state_dict())


def broken(**settings: Any) -> None:
    optimizer = started(**settings)
    for _ in range(2):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.full((6, 8), float("nan") if dist.get_rank() else 1.0)
        optimizer.step()


def on_a_node() -> None:
    os.environ.pop("LOCAL_WORLD_SIZE")
    LoRDO(named(), **SETTINGS, replica_size="node").step()


USED: dict[str, tuple[Callable[[], Any], str]] = {
    "pattern": (
        lambda: LoRDO(named(), **SETTINGS, low_rank={"include": ["x"]}).step(),
        "low_rank.include: 'x' matches no parameter name; names look like 'a.weight'",
    ),
    "nothing": (lambda: LoRDO(named()[1:], **SETTINGS).step(), 'set low_rank to {"exclude": [".*"]}'),
    "replicas": (lambda: LoRDO(named(), **SETTINGS, replica_size=3).step(), "replica_size = 3 must divide the"),
    "node": (on_a_node, 'replica_size = "node" needs LOCAL_WORLD_SIZE'),
    "replica's file": (of_other_replica, "load the file that this rank saved itself, in a run of as many ranks"),
    "settings": (of_other_settings(qh_mode="none"), "qh_mode: saved 'full_rank', this run 'none'"),
    "anchor": (of_other_settings(anchor={"dtype": "bf16"}), "anchor.dtype: saved 'fp32', this run 'bf16'"),
    "not finite": (lambda: broken(max_left_out_syncs=1), "max_left_out_syncs sets how often"),
    "too few": (
        lambda: broken(min_participants=2, max_nonfinite_syncs=1),
        "fewer than min_participants = 2",
    ),
    "no step": (lambda: LoRDO(named(), **SETTINGS).final_sync(), "final_sync() comes after the first step"),
    "no status": (lambda: lordo_ds.status(LoRDO(named(), **SETTINGS)), "has not made a step"),
}


def said() -> dict[str, str]:
    found = {}
    for case, (run, _) in USED.items():
        try:
            run()
            found[case] = "nothing"
        except (ValueError, RuntimeError) as error:
            found[case] = str(copy.copy(error))
    return found


@pytest.mark.distributed
def test_what_goes_wrong_alone_is_told_in_words_of_what_there_is() -> None:
    for found in run_ranks(said, 2, timeout_s=60):
        for case, (_, words) in USED.items():
            assert found[case].startswith("LoRDO: ") and words in found[case], (case, found[case])
            assert "\n" not in found[case] and not any(word in found[case] for word in FOREIGN), (case, found[case])


@pytest.mark.distributed
def test_what_needs_an_engine_says_that_it_was_given_an_optimizer() -> None:
    optimizer = LoRDO(named(), **SETTINGS)
    for call in (
        lambda: lordo_ds.data_sampler([1, 2], optimizer),
        lambda: lordo_ds.save_checkpoint(optimizer, "here"),
        lambda: lordo_ds.load_checkpoint(optimizer, "here"),
    ):
        with pytest.raises(ValueError, match=r"got a LoRDO optimizer: .* takes a DeepSpeed engine"):
            call()
