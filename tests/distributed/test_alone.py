"""An optimizer without an engine: what it makes of a model or of names, and what it refuses before anything moves."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lordo_ds
from lordo_ds import ConfigError, LoRDO
from tests.ranks import run_ranks

SETTINGS: dict[str, Any] = {"lr": 1e-2, "rank": 2, "sync_interval": 2}
ALL_DENSE = {**SETTINGS, "low_rank": {"exclude": [".*"]}}


class Gpt(nn.Module):
    """nanoGPT's names; the head is tied to the token embedding."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(12, 4), "wpe": nn.Embedding(6, 4)})
        self.blocks = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 4)])
        self.lm_head = nn.Linear(4, 12, bias=False)
        self.register_buffer("seen", torch.zeros(1))
        if tie:
            self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.transformer["wte"](tokens) + self.transformer["wpe"].weight[: tokens.shape[-1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.lm_head(hidden).square().mean()


def gpt(seed: int = 0, tie: bool = True) -> Gpt:
    torch.manual_seed(seed)
    return Gpt(tie)


def step(model: nn.Module, optimizer: LoRDO, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randint(0, 12, (3, 6), generator=generator)).backward()
    optimizer.step()


def planned(optimizer: LoRDO) -> dict[str, str]:
    """What is dense and why; every other parameter is projected."""
    return {plan.name: plan.reason for plan in optimizer.plans if not plan.low_rank}


# -- the model, or names -------------------------------------------------------------------------------

BIASES = {"blocks.0.bias": "1-D", "blocks.1.bias": "1-D"}


def test_the_model_itself_tells_embeddings_and_tied_weights() -> None:
    model = gpt()
    model.blocks[1].bias.requires_grad = False
    optimizer = LoRDO(model, **SETTINGS)
    step(model, optimizer)
    assert planned(optimizer) == {
        "transformer.wte.weight": "tied to an embedding",
        "transformer.wpe.weight": "embedding",
        "blocks.0.bias": "1-D",
    }
    compiled = nn.Module()  # as torch.compile makes one, in seconds
    compiled.add_module("_orig_mod", gpt())
    assert LoRDO(compiled, **SETTINGS).param_groups[0]["param_names"][0] == "transformer.wte.weight"


def test_groups_of_parameters_may_come_with_their_model() -> None:
    model = gpt(tie=False)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 1e-3}]
    optimizer = LoRDO(groups, model=model, **SETTINGS)
    step(model, optimizer)
    embeddings = {"transformer.wte.weight": "embedding", "transformer.wpe.weight": "embedding"}
    assert planned(optimizer) == {**embeddings, "lm_head.weight": "output head (lm_head)", **BIASES}
    with pytest.raises(ConfigError, match=r"parameter 0 of a group, .* is none of the model's"):
        step(gpt(), LoRDO(gpt(1).parameters(), model=model, **SETTINGS))
    for params, given in ((model, model), (model.parameters(), "gpt")):
        with pytest.raises(ConfigError, match=r"give LoRDO\(model, \.\.\.\) or LoRDO\(params, model=model"):
            LoRDO(params, model=given, **SETTINGS)
    for parameter in model.parameters():
        parameter.requires_grad = False
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        LoRDO(model, **SETTINGS)


def test_names_tell_embeddings_position_tables_and_heads_where_there_is_no_model() -> None:
    model = gpt()
    optimizer = LoRDO(model.named_parameters(), **SETTINGS)
    step(model, optimizer)
    by_name = {f"transformer.{name}.weight": f"embedding, by its name ({name})" for name in ("wte", "wpe")}
    assert planned(optimizer) == {**by_name, **BIASES}, "the tied head is the embedding"
    untied = gpt(tie=False)
    chosen = LoRDO(untied.named_parameters(), **SETTINGS, low_rank={"include": ["wte", "blocks"]})
    step(untied, chosen)
    assert "transformer.wte.weight" not in planned(chosen) and planned(chosen)["lm_head.weight"] == "not included"


def test_without_names_it_is_said_that_embeddings_cannot_be_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lordo_ds"):
        for given in (lambda m: m.parameters(), lambda m: m.named_parameters(), lambda m: m):
            model = gpt()
            step(model, LoRDO(given(model), **SETTINGS))
    told = [message for message in caplog.messages if "have no names" in message]
    assert len(told) == 1 and "among the 4 projected ones" in told[0] and "LoRDO(model, ...)" in told[0]


# -- what is refused -----------------------------------------------------------------------------------


def twice(model: Gpt) -> Any:
    return model.named_parameters(remove_duplicate=False)


def sharing_memory(model: Gpt) -> Any:
    model.blocks[1].weight = nn.Parameter(model.blocks[0].weight.data.view(4, 8))
    return model.named_parameters()


def of_one_name(model: Gpt) -> Any:
    return [("w", model.blocks[0].weight), ("w", model.blocks[1].weight)]


def changed(**change: Callable[[nn.Parameter], Any]) -> Callable[[Gpt], Any]:
    (how,) = change.values()

    def change_weight(model: Gpt) -> Any:
        model.blocks[0].weight = nn.Parameter(how(model.blocks[0].weight.data))
        return [(name, p) for name, p in model.named_parameters() if p.dim() > 1]

    return change_weight


REFUSED: dict[str, tuple[Callable[[Gpt], Any], str]] = {
    "twice": (twice, "transformer.wte.weight and lm_head.weight share memory: give tied weights as one parameter"),
    "memory": (sharing_memory, "blocks.0.weight and blocks.1.weight share memory"),
    "one name": (of_one_name, "2 parameters are called w: give each a name of its own"),
    "meta": (changed(to=lambda w: w.to("meta")), "blocks.0.weight is on the meta device, without values: give it"),
    "sparse": (changed(to=lambda w: w.to_sparse()), "blocks.0.weight is sparse_coo: give a dense parameter"),
    "complex": (changed(to=lambda w: w.to(torch.complex64)), "is torch.complex64: give torch.view_as_real"),
    "half": (changed(to=lambda w: w.half()), "is torch.float16: give fp32 or fp64 parameters"),
    "strided": (changed(to=lambda w: w.t()), "is not contiguous"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("settings", [SETTINGS, ALL_DENSE], ids=["low-rank", "dense"])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_what_cannot_be_stepped_is_refused_by_name(case: str, settings: dict[str, Any]) -> None:
    give, words = REFUSED[case]
    optimizer = LoRDO(give(gpt(tie=case == "twice")), **settings)
    with pytest.raises(ConfigError) as refused:
        optimizer.step()
    assert words in str(refused.value) and str(refused.value).startswith("LoRDO: ") and "\n" not in str(refused.value)
    assert optimizer.sync is None and not optimizer.state


def test_lazy_parameters_and_sparse_gradients_are_refused_by_name() -> None:
    lazy = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 4))
    for given in (lazy, lazy.named_parameters()):
        with pytest.raises(ConfigError, match=r"0\.weight is not initialised yet: run the model once"):
            LoRDO(given, **SETTINGS).step()
    model = gpt(tie=False)
    model.transformer["wte"].sparse = True
    optimizer = LoRDO(model, **SETTINGS)
    with pytest.raises(ConfigError, match=r"the gradient of transformer\.wte\.weight is sparse: set sparse=False"):
        step(model, optimizer)


def fully_sharded(use_orig_params: bool) -> tuple[nn.Module, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(gpt(tie=False), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    return model, model


def fully_sharded_2() -> tuple[nn.Module, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = gpt(tie=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, model.named_parameters()


def data_parallel(given: str) -> tuple[nn.Module, Any]:
    model = gpt()
    wrapped = nn.parallel.DistributedDataParallel(model)
    return wrapped, {"model": model, "wrapped": wrapped, "names": model.named_parameters()}[given]


def split_states() -> tuple[nn.Module, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = gpt()
    return model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=LoRDO, **ALL_DENSE)


WRAPPED: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], str]] = {
    "fsdp": (lambda: fully_sharded(False), "is sharded by FullyShardedDataParallel"),
    "fsdp, original parameters": (lambda: fully_sharded(True), "is sharded by FullyShardedDataParallel"),
    "fsdp2": (fully_sharded_2, "is a DTensor (fully_shard or parallelize_module)"),
    "ddp, the model inside": (lambda: data_parallel("model"), "averages gradients over ranks [0, 1] at every step"),
    "ddp": (lambda: data_parallel("wrapped"), "averages gradients over ranks [0, 1] at every step"),
    "ddp, names": (lambda: data_parallel("names"), "averages gradients over ranks [0, 1] at every step"),
    "zero redundancy": (split_states, "a ZeroRedundancyOptimizer gives every rank other parameters"),
}


def wrapped_models() -> dict[str, tuple[str, bool]]:
    """What each wrapper is refused with, and whether the parameters are as they were."""
    found: dict[str, tuple[str, bool]] = {}
    for case, (make, _) in WRAPPED.items():
        model, given = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(dist.get_rank())
        # All dense: with anything to project, the shapes alone may be refused.
        optimizer = given if hasattr(given, "optim") else LoRDO(given, **ALL_DENSE)
        before = [copy.deepcopy(p.detach()) for p in model.parameters()]
        try:
            optimizer.step()
            message = ""
        except ConfigError as error:
            message = str(error)
        equal = [bool((a == b).all()) for a, b in zip(before, model.parameters(), strict=True)]
        found[case] = message, all(equal)
    return found


@pytest.mark.distributed
def test_wrappers_that_shard_or_average_are_refused_before_anything_moves() -> None:
    for found in run_ranks(wrapped_models, 2, timeout_s=90):
        for case, (_, words) in WRAPPED.items():
            message, unchanged = found[case]
            assert words in message and "\n" not in message, (case, message)
            assert unchanged, case


# -- what is said --------------------------------------------------------------------------------------


@contextmanager
def messages() -> Iterator[list[str]]:
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    keep, logger = Keep(), logging.getLogger("lordo_ds")
    logger.addHandler(keep)
    try:
        yield found
    finally:
        logger.removeHandler(keep)


def replicas_of_two() -> dict[str, Any]:
    """DDP over the ranks of a replica is as it should be; one that is no more does not count."""
    rank = dist.get_rank()
    nn.parallel.DistributedDataParallel(gpt())  # over all ranks, and gone
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = nn.parallel.DistributedDataParallel(gpt(rank // 2), process_group=pairs[rank // 2])
    model.module.seen += rank // 2
    with messages() as said:
        optimizer = LoRDO(model, **SETTINGS, replica_size=2)
        for number in range(2):
            step(model, optimizer, 10 * number + rank)
        optimizer.final_sync()
    return {
        "said": said,
        "weights": [p.detach() for p in model.parameters()],
        "seen": float(model.module.seen),
        "status": lordo_ds.status(optimizer),
        "names": optimizer.param_groups[0]["param_names"],
    }


@pytest.mark.distributed
def test_a_replica_of_several_ranks_averages_its_gradients_with_ddp() -> None:
    found = run_ranks(replicas_of_two, 4, timeout_s=90)
    for rank, one in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(one["weights"], found[0]["weights"], strict=True))
        assert one["seen"] == 0.0, "buffers start as replica 0's"
        assert one["names"][0] == "transformer.wte.weight"
        status = one["status"]
        assert (status["replicas"], status["shard_size"], status["replica_index"]) == (2, 2, rank // 2)
        assert (status["step"], status["syncs"], status["low_rank_parameters"]) == (2, 1, 2)
        assert status["bytes_sent_total"] > 0 and status["ddp_bytes_per_step"] > 0 and status["last_sync"]["step"] == 2
        assert status["other_methods_bytes_per_step"]["adamw_ddp"] == status["ddp_bytes_per_step"]
        assert status["seconds_blocked_inside"]["twins"] == status["seconds_blocked_inside"]["everyone"] > 0, (
            "one group"
        )
        by_kind = status["bytes_inside_by_kind"]
        assert sum(by_kind["twins"].values()) == status["bytes_inside"]["twins"] > 0 and not by_kind["everyone"]
        assert status["last_step"]["bytes"]["twins"] and not status["last_step"]["bytes"]["everyone"], "counted once"
        tables = [line for line in one["said"] if "2 replicas of 2 data-parallel ranks, without an engine" in line]
        assert len(tables) == (rank == 0), "rank 0 says what the others would repeat"
    said = "\n".join(found[0]["said"])
    assert "1 x (12, 4)          dense     tied to an embedding: transformer.wte.weight" in said
    assert "LoRDO: state on this rank: dense_exp_avg 0.00 MiB" in said and "ZeRO" not in said


def one_replica() -> tuple[dict[str, Any], list[str], float]:
    """All ranks are one replica: DDP over them is as it should be, and nobody is asked anything."""
    model = nn.parallel.DistributedDataParallel(gpt())
    with messages() as said:
        optimizer = LoRDO(model, **SETTINGS, replica_size="all")
        for number in range(2):
            step(model, optimizer, 10 * number + dist.get_rank())
    return lordo_ds.status(optimizer), said, float(sum(p.sum() for p in model.parameters()))


@pytest.mark.distributed
def test_all_ranks_may_be_one_replica() -> None:
    (status, said, total), (_, quiet, same) = run_ranks(one_replica, 2, timeout_s=60)
    assert (status["replicas"], status["shard_size"], status["bytes_sent_total"]) == (1, 2, 0) and total == same
    assert "LoRDO: 1 replicas of 2 data-parallel ranks, without an engine" in said[0] and not quiet


def resumed_from_files(folder: str) -> list[bool]:
    """As the README says: a file per rank, the model loaded before the optimizer; at step 3, one after a sync."""
    path = Path(folder, f"rank_{dist.get_rank()}.pt")
    straight = gpt()
    optimizer = LoRDO(straight, **SETTINGS, preset="recommended")
    for number in range(1, 7):
        step(straight, optimizer, 10 * number + dist.get_rank())
        if number == 3:
            torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, path)
    again = gpt(seed=dist.get_rank())
    fresh = LoRDO(again, **SETTINGS, preset="recommended")
    saved = torch.load(path, weights_only=True)
    again.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    for number in range(4, 7):
        step(again, fresh, 10 * number + dist.get_rank())
    return [torch.equal(a, b) for a, b in zip(straight.parameters(), again.parameters(), strict=True)]


@pytest.mark.distributed
def test_a_run_goes_on_from_the_files_of_its_ranks(tmp_path: Path) -> None:
    assert all(all(found) for found in run_ranks(resumed_from_files, 2, str(tmp_path), timeout_s=60))


def given_equal_data() -> list[str]:
    with messages() as said:
        for seed in (0, dist.get_rank()):
            model = gpt()
            step(model, LoRDO(model, **SETTINGS), seed)
        model = gpt()
        optimizer = LoRDO(model, **SETTINGS)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return [line for line in said if "equal to the bit" in line]


@pytest.mark.distributed
def test_gradients_that_are_equal_on_all_replicas_are_pointed_out() -> None:
    first, second = run_ranks(given_equal_data, 2, timeout_s=60)
    assert len(first) == 1 and "the first gradients of all replicas are equal to the bit" in first[0] and not second
