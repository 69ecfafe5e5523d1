"""A model under `fully_shard` trains as it does whole: tied, frozen, in groups, accumulated, clipped, scaled, in bf16.

The same ranks also train it whole, every two of them a replica that averages its gradients itself; that way of
training is compared with the reference elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lordo_ds
from lordo_ds import LoRDO
from tests.cases import Found, once, run_cases
from tests.distributed.test_alone import messages
from tests.ranks import run_ranks
from tests.sharded import whole

pytestmark = pytest.mark.distributed

STEPS, WIDTH = 7, 6
SETTINGS: dict[str, Any] = {"lr": 2e-2, "eps": 1e-2, "weight_decay": 0.1, "rank": 2, "sync_interval": 3}
OVERFLOWS = (2, 5)  # steps at which a gradient of replica 0 is not finite, on its first shard only


class Gpt(nn.Module):
    """Embeddings, a tied head, a norm; `seen` counts calls."""

    def __init__(self, dtype: torch.dtype, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, WIDTH, dtype=dtype)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH, dtype=dtype), nn.Linear(WIDTH, hidden, dtype=dtype), nn.Tanh(),
                          nn.Linear(hidden, WIDTH, dtype=dtype))
            for _ in range(2)
        )  # fmt: skip
        self.lm_head = nn.Linear(WIDTH, vocabulary, bias=False, dtype=dtype)
        self.lm_head.weight = self.wte.weight
        self.register_buffer("offset", torch.randn(WIDTH, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.wte(tokens)
        hidden = embedded + self.offset.to(embedded.dtype)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return nn.functional.cross_entropy(self.lm_head(hidden).flatten(0, 1), tokens.roll(-1).flatten())


@dataclass(frozen=True)
class Case:
    """How a model is trained; both ways."""

    dtype: torch.dtype = torch.float64
    given: str = "model"
    micro_batches: int = 1
    clip: float = 0.0
    frozen: bool = False
    scaled: bool = False
    compute: torch.dtype | None = None
    mesh: str = "mesh"
    warm_up: bool = False
    stays_gathered: bool = False
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, int]:
        """Of the vocabulary and the hidden layers: no multiples of the shards, but multiples of the slices."""
        return (13, 9) if self.tensor == 1 else (14, 8)

    def data_rank(self) -> int:
        return dist.get_rank() // self.tensor


CASES = {
    "plain": Case(),
    "names": Case(given="names"),
    "groups": Case(given="groups"),
    "frozen": Case(frozen=True),
    "accumulated": Case(micro_batches=2),
    "clipped": Case(clip=0.2),
    "scaled": Case(scaled=True),
    "the replica group": Case(mesh="group"),
    "warm-up from zero": Case(warm_up=True),
    "not resharded by itself": Case(stays_gathered=True),
    "tensor- and sequence-parallel": Case(tensor=2),
    "tensor- and sequence-parallel, clipped": Case(tensor=2, clip=0.2),
    "bf16": Case(dtype=torch.float32, compute=torch.bfloat16),
}


def gpt(case: Case) -> Gpt:
    torch.manual_seed(0)
    model = Gpt(case.dtype, *case.sizes)
    if case.frozen:
        model.blocks[1].requires_grad_(False)
        model.wte.weight.requires_grad_(False)
    return model


def optimizer_of(case: Case, model: nn.Module, **where: Any) -> LoRDO:
    if case.given == "model":
        return LoRDO(model, **SETTINGS, **where)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if case.given == "names":
        return LoRDO(named, **SETTINGS, **where)
    groups = [
        {"params": [p for _, p in named if p.dim() > 1], "lr": 1e-2},
        {"params": [p for _, p in named if p.dim() == 1], "weight_decay": 0.0},
    ]
    return LoRDO(groups, model=model, **SETTINGS, **where)


def batch(case: Case, step: int, micro_batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * case.data_rank() + micro_batch)
    return torch.randint(0, case.sizes[0], (3, 4 + case.tensor), generator=generator)


def slice_layers(model: Gpt, mesh: Any) -> None:
    """As torch's guide to tensor parallelism does it, with norms on parts of the sequence."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan: dict[str, Any] = {
        "wte": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for i in range(len(model.blocks)):
        plan[f"blocks.{i}.0"] = SequenceParallel()
        plan[f"blocks.{i}.1"] = ColwiseParallel(input_layouts=Shard(1))
        plan[f"blocks.{i}.3"] = RowwiseParallel(output_layouts=Shard(1))
    parallelize_module(model, mesh, plan)
    model.lm_head.weight = model.wte.weight


def take_step(
    case: Case, step: int, model: nn.Module, optimizer: LoRDO, scaler: torch.amp.GradScaler, spoil: Callable[[], None]
) -> None:
    """After the backward pass: as torch's examples do."""
    if case.scaled and step in OVERFLOWS:
        spoil()
    if case.warm_up:
        for group in optimizer.param_groups:
            group["lr"] = min(step - 1, 2) * 1e-2
    if case.clip:
        clip = torch.nn.utils.clip_grad_norm_ if case.tensor == 1 else lordo_ds.clip_grad_norm_
        clip(model.parameters(), case.clip)
    scaler.step(optimizer)
    scaler.update()


def sharded_run(case: Case) -> Iterator[dict[str, Tensor]]:
    """The whole weights after every step, and after a final sync."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    mesh = lordo_ds.replica_mesh("cpu", 2 // case.tensor, case.tensor)
    replica, shard = mesh.get_coordinate()[:2]
    model = gpt(case)
    model.offset += replica  # the first step makes it replica 0's
    if case.tensor > 1:
        slice_layers(model, mesh["tensor"])
    policy = MixedPrecisionPolicy(param_dtype=case.compute, reduce_dtype=torch.float32 if case.compute else None)
    lordo_ds.shard_model(model, mesh, model.blocks, mp_policy=policy)
    model.set_reshard_after_backward(not case.stays_gathered)
    optimizer = optimizer_of(case, model, mesh=mesh if case.mesh == "mesh" else mesh.get_group("replica"))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=case.scaled)

    def spoil() -> None:
        if (replica, shard) == (0, 0):
            model.blocks[0][1].weight.grad.to_local()[0, 0] = float("inf")

    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        for micro_batch in range(case.micro_batches):
            model.set_requires_gradient_sync(micro_batch == case.micro_batches - 1)
            scaler.scale(model(batch(case, step, micro_batch)) / case.micro_batches).backward()
        take_step(case, step, model, optimizer, scaler, spoil)
        for module in (model, *model.blocks) if case.stays_gathered else ():
            module.reshard()
        yield {name: whole(p) for name, p in model.named_parameters()}
    optimizer.final_sync()
    assert all(p.dtype == case.dtype for p in model.parameters())
    yield {**{name: whole(p) for name, p in model.named_parameters()}, "offset": model.offset}


def whole_run(case: Case) -> Iterator[dict[str, Tensor]]:
    """The same by ranks that hold the whole model, two of them a replica."""
    replica = dist.get_rank() // 2
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][replica]
    model = gpt(case)
    model.offset += replica
    optimizer = optimizer_of(case, model, replica_size=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=case.scaled)

    def spoil() -> None:
        if replica == 0:
            model.blocks[0][1].weight.grad[0, 0] = float("inf")

    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        for micro_batch in range(case.micro_batches):
            computes = copy.deepcopy(model).to(case.compute) if case.compute else model
            scaler.scale(computes(batch(case, step, micro_batch)) / case.micro_batches).backward()
            for parameter, computed in zip(model.parameters(), computes.parameters(), strict=True):
                if computed is not parameter and computed.grad is not None:
                    parameter.grad = computed.grad.to(parameter.dtype)
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=pair)
                parameter.grad /= 2
        take_step(case, step, model, optimizer, scaler, spoil)
        yield {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.final_sync()
    yield {**{name: p.detach().clone() for name, p in model.named_parameters()}, "offset": model.offset}


def compare(case: Case) -> tuple[float, float]:
    """The largest distance of the two at any step, and how far the weights came."""
    runs = list(sharded_run(case)), list(whole_run(case))
    worst = max(
        float((a[name] - b[name]).abs().max() / b[name].abs().max())
        for a, b in zip(*runs, strict=True)
        for name in b
    )  # fmt: skip
    start = dict(gpt(case).named_parameters())
    moved = max(float((runs[0][-1][name] - p).abs().max() / p.abs().max()) for name, p in start.items())
    return worst, moved


@once
def all_cases() -> Found[str]:
    return run_cases(compare, 4, {name: (case,) for name, case in CASES.items()}, timeout_s=180)


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_model_trains_as_the_whole_one(name: str) -> None:
    for worst, moved in all_cases()[name]:
        assert moved > 1e-2
        assert worst < (1e-9 if CASES[name].dtype == torch.float64 else 1e-4), f"{worst:.1e}"


# -- one replica that is wrong -------------------------------------------------------------------------


def one_shard_not_finite() -> dict[str, Any]:
    """A weight of replica 1 becomes NaN on its second shard, before the sync at step 3."""
    mesh = lordo_ds.replica_mesh("cpu", shards=2)
    replica, shard = mesh.get_coordinate()
    model = lordo_ds.shard_model(gpt(Case()), mesh)
    optimizer = LoRDO(model, mesh=mesh, **SETTINGS)
    for step in range(1, 5):
        optimizer.zero_grad()
        model(batch(Case(), step, 0)).backward()
        if step == 3 and (replica, shard) == (1, 1):
            model.blocks[0][1].weight.grad.to_local()[-1, -1] = float("nan")
        optimizer.step()
        if step == 3:
            synced = {name: whole(p) for name, p in model.named_parameters()}
    return {"synced": synced, "status": lordo_ds.status(optimizer), "finite": all_finite(model)}


def all_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(whole(p)).all()) for p in model.parameters())


def test_a_replica_with_one_shard_that_is_not_finite_is_left_out_and_takes_over() -> None:
    found = run_ranks(one_shard_not_finite, 4, timeout_s=60)
    for one in found:
        assert one["finite"] and one["status"]["syncs_left_out_by_replica"] == [0, 1]
        assert all(torch.equal(one["synced"][name], found[0]["synced"][name]) for name in one["synced"])


def given_equal_data() -> list[str]:
    model = lordo_ds.shard_model(gpt(Case()), mesh := lordo_ds.replica_mesh("cpu", shards=2))
    with messages() as said:
        for seed in (0, dist.get_rank() // 2):
            optimizer = LoRDO(model, mesh=mesh, **SETTINGS)
            optimizer.zero_grad()
            model(torch.randint(0, 13, (3, 5), generator=torch.Generator().manual_seed(seed))).backward()
            optimizer.step()
    return [line for line in said if "equal to the bit" in line]


def test_gradients_that_are_equal_on_all_replicas_are_pointed_out() -> None:
    first, *others = run_ranks(given_equal_data, 4, timeout_s=60)
    assert len(first) == 1 and "the first gradients of all replicas are equal" in first[0] and not any(others)
