"""An optimizer without an engine: its parameters from a model or from names, its replicas from torch.distributed."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lordo_ds.comm.checksum import checksum
from lordo_ds.comm.connect import connect
from lordo_ds.comm.equalise import equalise_untrained, warn_of_left_out
from lordo_ds.comm.groups import groups_for, of_all_ranks, own_purpose, replica_groups
from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.nodes import layout_of_replicas
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.comm.wrapped import refuse_averaging, refuse_splitting
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import FlatTensor
from lordo_ds.core.grouping import ParameterFacts, ParameterPlan, model_facts
from lordo_ds.core.names import embedding_in
from lordo_ds.core.steppable import refuse_shared_memory, refuse_unsteppable
from lordo_ds.errors import ConfigError
from lordo_ds.replica.model_size import ModelSize
from lordo_ds.start_table import RunShape, show_messages, start_table
from lordo_ds.sync.alike import Start, require_alike, start_alone
from lordo_ds.sync.background import BackgroundGroups
from lordo_ds.sync.outer_sync import OuterSync

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


def flat_tensors(param_groups: Iterable[Mapping[str, Any]], model: GivenModel | None) -> list[FlatTensor]:
    """The parameters of all groups, with what is known of each.

    Raises:
        ConfigError: one that cannot be stepped, that is none of the model's, or that is there twice.
    """
    flats: list[FlatTensor] = []
    for group in param_groups:
        names = group.get("param_names")
        for index, parameter in enumerate(group["params"]):
            refuse_unsteppable(names[index] if names else f"parameter_{len(flats)}", parameter)
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
            flats.append(FlatTensor.of_one(parameter, fact))
    named = [(flat.pieces[0].facts.name, flat.tensor) for flat in flats]
    refuse_shared_memory(named)
    for name, count in Counter(name for name, _ in named).items():
        if count > 1:
            raise ConfigError(f"LoRDO: {count} parameters are called {name}: give each a name of its own")
    return flats


def agreed_tensors(
    optimizer: Any, config: LordoConfig, param_groups: Sequence[Mapping[str, Any]], model: GivenModel | None
) -> list[FlatTensor]:
    """`flat_tensors`, once all ranks were found to be started alike. Collective over all ranks where there are several.

    Raises:
        ConfigError: the same one on all ranks: a difference, or what one of them cannot step.
    """
    if not _several_ranks():
        return flat_tensors(param_groups, model)
    flats: list[FlatTensor] = []
    try:
        refuse_splitting(optimizer)
        flats = flat_tensors(param_groups, model)
        start = start_alone(config, param_groups, {id(flat.tensor): flat.pieces[0].facts.name for flat in flats})
    except ConfigError as error:
        start = Start(refusal=str(error))
    require_alike(start)
    return flats


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def replicas_of_torch(
    config: LordoConfig, device: torch.device
) -> tuple[ReplicaWire, InsideReplica, BackgroundGroups | None]:
    """Every `replica_size` ranks of torch.distributed are a replica. Collective over all ranks where there are several.

    Returns:
        Across replicas; the groups inside this one, whose ranks are alike; with a delay, both once more for syncs
        beside training. One replica alone asks nobody.
    """
    overlaps = config.streaming.delay_steps > 0
    if _several_ranks():
        groups = replica_groups(layout_of_replicas(range(dist.get_world_size()), config.replica_size, "replica_size"))
        if groups.layout.replica_count > 1:
            alike = {"sharded": False, "only_data_parallel": True}
            wire, inside = connect(groups, device, **alike)
            beside = connect(groups_for(own_purpose(), groups), device, **alike) if overlaps else None
            return wire, inside, BackgroundGroups(*beside) if beside else None
    wire, inside = ReplicaWire(), InsideReplica(device=device)
    return wire, inside, BackgroundGroups(ReplicaWire(), InsideReplica(device=device)) if overlaps else None


def dist_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def shape_alone(sync: OuterSync) -> RunShape:
    """The mesh of a run without an engine."""
    several, spread = sync.wire.replicas > 1, dist.is_available() and dist.is_initialized()
    size = dist.get_world_size() if spread and not several else sync.inside.rows.size
    return RunShape(sync.wire.replicas, sync.wire.index, size)


def prepare(
    model: GivenModel | None,
    flats: Sequence[FlatTensor],
    wire: ReplicaWire,
    inside: InsideReplica,
    resuming: bool,
) -> None:
    """What comes before the optimizer attaches: refusals, and equal models. Collective over replicas.

    Args:
        resuming: every replica keeps what it has loaded.
    """
    if wire.replicas > 1:
        replica = dist.get_process_group_ranks(inside.rows.group)
        refuse_averaging({flat.tensor for flat in flats}, replica)
    if not resuming:
        equalise_model(model, flats, wire, inside.device)
    show_messages(dist_rank())


def equalise_model(
    model: GivenModel | None, flats: Sequence[FlatTensor], wire: ReplicaWire, device: torch.device
) -> None:
    """Frozen parameters and buffers become replica 0's, where the model is known. Collective over replicas."""
    if model is None:
        return
    trained = {flat.tensor for flat in flats}
    left_out = [fact.name for p, fact in model.facts.items() if p.requires_grad and p not in trained]
    warn_of_left_out(left_out)
    equalise_untrained(model.module, trained, wire, device)


def say_start(config: LordoConfig, flats: Sequence[FlatTensor], sync: OuterSync, size: ModelSize) -> None:
    """What rank 0 says when it has attached."""
    if dist_rank() == 0:
        warn_of_missing_names(
            [item.plan for item in sync.items], named=all(flat.pieces[0].facts.named for flat in flats)
        )
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


def warn_of_equal_gradients(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Say so where all replicas got the same first gradients, to the bit. Collective over all ranks, once.

    Either something averages gradients over all of them at every step, or all were given the same data; both make
    replicas useless, and neither is an error that can be proved.

    Args:
        param_groups: with this rank's gradients; none if it skipped its first step.
    """
    gradients = [t.grad for group in param_groups for t in group["params"] if t.grad is not None]
    mine = checksum(gradients) if any(bool(gradient.any()) for gradient in gradients) else 0
    if set(of_all_ranks(mine)) == {mine} and mine and dist.get_rank() == 0:
        logger.warning(
            "LoRDO: the first gradients of all replicas are equal to the bit: either all were given the same data, or "
            "something averages gradients across replicas at every step, which LoRDO is there to avoid"
        )
