"""An optimizer without an engine: its parameters from a model or from names, its replicas from torch.distributed."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lordo_ds.comm.checksum import checksum
from lordo_ds.comm.equalise import equalise_untrained, warn_of_left_out
from lordo_ds.comm.groups import of_all_ranks, own_purpose
from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.comm.wrapped import refuse_averaging, refuse_splitting
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import FlatTensor
from lordo_ds.core.grouping import ParameterFacts, ParameterPlan, model_facts
from lordo_ds.core.local import local_part
from lordo_ds.core.names import embedding_in
from lordo_ds.core.steppable import refuse_shared_memory
from lordo_ds.errors import ConfigError
from lordo_ds.ranks import Ranks, several_ranks
from lordo_ds.replica.allocate import Held
from lordo_ds.replica.model_size import ModelSize
from lordo_ds.start_table import RunShape, show_messages, start_table
from lordo_ds.sync.alike import Start, require_alike, start_alone
from lordo_ds.sync.background import BackgroundGroups
from lordo_ds.sync.outer_sync import OuterSync
from lordo_ds.watch.unwatched import Unwatched
from lordo_ds.watch.watchdog import watch_ranks

logger = logging.getLogger("lordo_ds")

# What torch's wrappers put into the names of parameters that they do not change.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


class GivenModel:
    """The model whose parameters an optimizer is given; it tells embeddings, tied weights and names."""

    def __init__(self, model: nn.Module) -> None:
        self.module = _unwrapped(model)

    @cached_property
    def facts(self) -> dict[Tensor, ParameterFacts]:
        """Of every parameter, as the model is when the first step begins."""
        found = model_facts(self.module).items()
        return {parameter: dataclasses.replace(fact, name=_plain(fact.name)) for parameter, fact in found}

    def trained(self) -> list[tuple[str, Tensor]]:
        """The named parameters that require a gradient."""
        found: list[tuple[str, Tensor]] = [
            (_plain(name), p) for name, p in self.module.named_parameters() if p.requires_grad
        ]
        if not found:
            raise ConfigError("LoRDO: the model has no parameter that requires a gradient: nothing is left to train")
        return found


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module whose parameters have the names that users know."""
    while True:
        inner = model._modules.get("_orig_mod")  # torch.compile's
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def given_model(params: Any, model: Any) -> tuple[Any, GivenModel | None]:
    """What `LoRDO(params, model)` got: parameters as torch's optimizers take them, and the model if there is one."""
    if model is None and isinstance(params, nn.Module):
        found = GivenModel(params)
        return found.trained(), found
    if model is None:
        return params, None
    if not isinstance(model, nn.Module) or isinstance(params, nn.Module):
        raise ConfigError(
            "LoRDO: give LoRDO(model, ...) or LoRDO(params, model=model, ...), with the nn.Module that the parameters "
            f"belong to; got {type(params).__name__} and {type(model).__name__}"
        )
    return params, GivenModel(model)


def flat_tensors(param_groups: Iterable[Mapping[str, Any]], model: GivenModel | None, ranks: Ranks) -> list[FlatTensor]:
    """The parameters of all groups, with what is known of each.

    Raises:
        ConfigError: one that cannot be stepped, that is none of the model's, or that is there twice.
    """
    if model is not None:
        ranks.at_rest(model.module)
    ranks.look(parameter for group in param_groups for parameter in group["params"])
    flats: list[FlatTensor] = []
    for group in param_groups:
        names = group.get("param_names")
        for index, parameter in enumerate(group["params"]):
            ranks.check(names[index] if names else f"parameter_{len(flats)}", parameter)
            if model is not None and parameter in model.facts:
                fact = model.facts[parameter]
            elif model is not None:
                raise ConfigError(
                    f"LoRDO: parameter {index} of a group, {tuple(parameter.shape)}, is none of the model's: give the "
                    "model that all of the parameters belong to"
                )
            elif names:
                shape = tuple(parameter.shape)
                fact = ParameterFacts(names[index], shape, embedding_name=embedding_in(names[index]))
            else:
                fact = ParameterFacts(f"parameter_{len(flats)}", tuple(parameter.shape), named=False)
            flats.append(ranks.flat_of(parameter, fact))
    named = [(flat.pieces[0].facts.name, flat.tensor) for flat in flats]
    refuse_shared_memory(named)
    for name, count in Counter(name for name, _ in named).items():
        if count > 1:
            raise ConfigError(f"LoRDO: {count} parameters are called {name}: give each a name of its own")
    return flats


def agreed_tensors(
    optimizer: Any,
    config: LordoConfig,
    param_groups: Sequence[Mapping[str, Any]],
    model: GivenModel | None,
    ranks: Ranks,
) -> list[FlatTensor]:
    """`flat_tensors`, once all ranks were found to be started alike. Collective over all ranks where there are several.

    Raises:
        ConfigError: the same one on all ranks: a difference, or what one of them cannot step.
    """
    if not several_ranks():
        return flat_tensors(param_groups, model, ranks)
    flats: list[FlatTensor] = []
    try:
        refuse_splitting(optimizer)
        flats = flat_tensors(param_groups, model, ranks)
        start = start_alone(config, param_groups, {id(flat.tensor): flat.pieces[0].facts.name for flat in flats})
        start = dataclasses.replace(start, everywhere={**start.everywhere, **ranks.texts()})
    except ConfigError as error:
        start = Start(refusal=str(error))
    require_alike(start)
    return flats


def dist_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def shape_alone(sync: OuterSync) -> RunShape:
    """The mesh of a run without an engine."""
    inside, spread = sync.inside, dist.is_available() and dist.is_initialized()
    told = sync.wire.replicas > 1 or inside.everyone.size > 1
    size = dist.get_world_size() if spread and not told else inside.rows.size
    return RunShape(sync.wire.replicas, sync.wire.index, size, inside.tensor.size)


class Run(Protocol):
    """What is read of an optimizer without an engine: see `LoRDO`."""

    config: LordoConfig
    param_groups: list[dict[str, Any]]
    ranks: Ranks
    watchdog: Unwatched
    sync: OuterSync | None
    held: Held
    model_size: ModelSize

    def attach(
        self,
        flats: Sequence[FlatTensor],
        wire: ReplicaWire,
        inside: InsideReplica | None = None,
        *,
        resuming: bool,
        background: BackgroundGroups | None,
    ) -> None: ...


def attach(run: Run, model: GivenModel | None, resuming: bool) -> bool:
    """Find the parameters and the replicas, and attach the optimizer to them. Collective over all ranks.

    Args:
        resuming: every replica keeps the weights that it has.

    Returns:
        Whether the replicas' first gradients are to be compared.
    """
    run.watchdog = watch_ranks(run.config.sync_timeout_s, owner=run)  # some may be late
    with run.watchdog.starting():
        flats = agreed_tensors(run, run.config, run.param_groups, model, run.ranks)
        device = local_part(flats[0].tensor).device if flats else torch.device("cpu")
        wire, inside = run.ranks.connect(run.config, device)
        background = None
        if run.config.streaming.delay_steps:
            background = BackgroundGroups(*run.ranks.connect(run.config, device, own_purpose()))
            background.wire.slow_link = wire.slow_link
    if wire.replicas > 1:
        refuse_averaging({flat.tensor for flat in flats}, dist.get_process_group_ranks(inside.everyone.group))
    show_messages(dist_rank())
    if not resuming:
        equalise_model(model, {flat.tensor for flat in flats}, wire, inside.device)
    run.attach(flats, wire, inside, resuming=resuming, background=background)
    assert run.sync is not None
    say_start(run.config, run.held, run.sync, run.model_size)
    return wire.replicas > 1 and not resuming


def start(run: Run, model: GivenModel | None) -> bool:
    """Make the replicas equal, where attaching left that for later. Collective over replicas; returns as `attach`."""
    assert run.sync is not None
    if model is not None:
        run.ranks.at_rest(model.module)
    equalise_model(model, run.held.of_tensor, run.sync.wire, run.sync.inside.device)
    run.sync.start()
    run.sync.outside.record()
    return run.sync.wire.replicas > 1


def equalise_model(
    model: GivenModel | None, trained: Collection[Tensor], wire: ReplicaWire, device: torch.device
) -> None:
    """Frozen parameters and buffers become replica 0's, where the model is known. Collective over replicas."""
    if model is None:
        return
    left_out = [fact.name for p, fact in model.facts.items() if p.requires_grad and p not in trained]
    warn_of_left_out(left_out)
    equalise_untrained(model.module, trained, wire, device)


def say_start(config: LordoConfig, held: Held, sync: OuterSync, size: ModelSize) -> None:
    """What rank 0 says when it has attached."""
    if dist_rank() == 0:
        warn_of_missing_names(held.plans, named=all(fact.named for fact in held.facts))
        for line in start_table(config, shape_alone(sync), size, sync.items):
            logger.info(line)


def warn_of_missing_names(plans: Sequence[ParameterPlan], named: bool) -> None:
    projected = sum(plan.low_rank for plan in plans)
    if projected and not named:
        logger.warning(
            "LoRDO: the parameters have no names, so embeddings and output heads among the %d projected ones cannot be "
            "told from other matrices: use LoRDO(model, ...) or LoRDO(groups, model=model, ...)",
            projected,
        )


def warn_of_equal_gradients(param_groups: Sequence[Mapping[str, Any]], inside: InsideReplica) -> None:
    """Say so where all replicas got the same first gradients, to the bit. Collective over all ranks, once.

    Either something averages gradients over all of them at every step, or all were given the same data; both make
    replicas useless, and neither is an error that can be proved.

    Args:
        param_groups: with this rank's gradients; none if it skipped its first step.
        inside: this rank's place in its replica; those of one place hold parts of the same parameters.
    """
    place = inside.shard.index * inside.tensor.size + inside.tensor.index
    gradients = [local_part(t.grad) for group in param_groups for t in group["params"] if t.grad is not None]
    mine = checksum(gradients) if any(bool(gradient.any()) for gradient in gradients) else 0
    everybody = of_all_ranks((place, mine))
    if mine and all(one == mine for where, one in everybody if where == place) and dist.get_rank() == 0:
        logger.warning(
            "LoRDO: the first gradients of all replicas are equal to the bit: either all were given the same data, or "
            "something averages gradients across replicas at every step, which LoRDO is there to avoid"
        )
