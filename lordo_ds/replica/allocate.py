"""Planning and allocation, once, before the first step: what a rank holds of the model, and the state of it."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import FlatTensor
from lordo_ds.core.grouping import ParameterFacts, ParameterPlan, plan_parameters
from lordo_ds.core.local import local_part
from lordo_ds.core.model_fragments import model_fragments
from lordo_ds.core.steppable import refuse_unsteppable
from lordo_ds.errors import ConfigError
from lordo_ds.replica.copies import TiedWeight
from lordo_ds.replica.fragment import Fragment

logger = logging.getLogger("lordo_ds")


@dataclass(frozen=True)
class Held:
    """What a rank holds of the model: facts, plan and fragment of each parameter, in one order on all its shards.

    `tied` names those that other pipeline stages have copies of.
    """

    facts: Sequence[ParameterFacts] = ()
    plans: Sequence[ParameterPlan] = ()
    fragments: Sequence[Fragment] = ()
    of_tensor: Mapping[Tensor, Sequence[Fragment]] = field(default_factory=dict)
    tied: frozenset[str] = frozenset()


def allocate(
    config: LordoConfig,
    flats: Sequence[FlatTensor],
    param_groups: Iterable[dict[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
    inside: InsideReplica,
    tied: Sequence[TiedWeight],
) -> Held:
    """Plan every parameter and allocate its state. Collective over the replica.

    Args:
        flats: see `LoRDO.attach`.
        param_groups: the tensors of `flats` are in these; a fragment reads its betas there.
        states: by tensor, filled here: what the optimizer saves.

    Raises:
        ConfigError: a parameter that cannot be stepped, or another layout on another tensor-parallel rank.
    """
    pieces = [(flat, piece) for flat in flats for piece in flat.pieces]
    facts = [piece.facts for _, piece in pieces]
    for flat, piece in pieces:
        refuse_unsteppable(piece.facts.name, local_part(flat.tensor))
    plans = plan_parameters(config, facts, inside.of_every_rank(facts))
    precisions = {str(flat.tensor.dtype).removeprefix("torch.") for flat in flats}
    if len(precisions) > 1:
        raise ConfigError(f"LoRDO: parameters of several precisions, {sorted(precisions)}: give all in the same")
    group_of = {tensor: group for group in param_groups for tensor in group["params"]}
    stages = {weight.name: weight.stage for weight in tied}
    fragments, of_tensor = [], dict[Tensor, list[Fragment]]()
    for (flat, piece), plan in zip(pieces, plans, strict=True):
        if plan.low_rank and plan.name in stages:
            raise ConfigError(
                f"LoRDO: {plan.name} is shared by several pipeline stages and cannot be projected: add it to "
                f"{config.key('low_rank.exclude')}"
            )
        state, copied = states[flat.tensor].setdefault(plan.name, {}), stages.get(plan.name, 0) > 0
        fragment = Fragment(
            plan, flat.tensor, piece.offset, piece.intervals, inside, state, group_of[flat.tensor], copied
        )
        fragment.allocate(config)
        fragments.append(fragment)
        of_tensor.setdefault(flat.tensor, []).append(fragment)
    _tell_of_clipped(config, plans)
    _require_alike(fragments, inside)
    return Held(facts, plans, fragments, of_tensor, frozenset(stages))


def fragment_of_each(config: LordoConfig, held: Held, inside: InsideReplica) -> dict[str, int]:
    """Which fragment of the model each parameter is in, by name; none without `streaming`. Collective over the replica.

    Equal on all ranks, at any number of stages, shards and slices. The ranks of a replica are in the order of its
    stages, so that the first of them that holds a parameter says where it lies in the model.

    Raises:
        ConfigError: more fragments than layers. On all ranks.
    """
    if not config.streaming.is_on:
        return {}
    pairs = sorted(zip(held.facts, held.plans, strict=True), key=lambda pair: pair[0].position)
    mine = [(plan.name, plan.numel * plan.partitions) for _, plan in pairs]
    return model_fragments(config, inside.of_every_rank(mine))


def _tell_of_clipped(config: LordoConfig, plans: Sequence[ParameterPlan]) -> None:
    clipped = [plan for plan in plans if plan.rank_clipped]
    if clipped:
        logger.info(
            "LoRDO: rank %s is clipped to the smaller side of %d matrices, the first to %d: %s",
            config.rank, len(clipped), clipped[0].rank, clipped[0].name,
        )  # fmt: skip


def _require_alike(fragments: Sequence[Fragment], inside: InsideReplica) -> None:
    """The slices and copies on the tensor-parallel ranks must lie in the same places: they travel together."""
    layout = repr([(f.plan.name, f.plan.shape, f.plan.rank, f.plan.partitions, f.intervals) for f in fragments])
    sums = inside.tensor.gather(inside.vector([zlib.crc32(layout.encode())]), "start")
    if not bool((sums == sums[0]).all()):
        raise ConfigError(
            "LoRDO: the tensor-parallel ranks hold other parameters than each other, or other shapes: give every "
            "rank the same model and the same parameter groups"
        )
