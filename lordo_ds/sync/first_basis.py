"""The first bases that replicas share: from one gradient, averaged at the end of the step that gave it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.core.schedule import first_basis_due
from lordo_ds.costs import Links, first_basis_bytes
from lordo_ds.replica.bases import Bases
from lordo_ds.replica.fragment import Fragment
from lordo_ds.sync.header import FirstBasisFlags


def first_bases_(bases: Bases, wire: ReplicaWire, step: int, executed_before: int, executed_now: bool) -> None:
    """Bases from the gradients averaged over the replicas that executed the step and are finite. Collective.

    A matrix whose average is zero still has none then. Of those that are zero on this rank in every replica no
    element travels.

    Args:
        executed_before: steps that this replica has executed before this one.
        executed_now: whether it executed this one.
    """
    waiting = [item for item in bases.items if not item.has_basis]
    peaks = _peaks(waiting)
    gives = not bases.inside.any_rank(not executed_now or not all(map(math.isfinite, peaks)))
    mine = FirstBasisFlags(step, gives, executed_before, executed_now)
    flags, moves = mine.exchange(wire, bases.inside, "first_basis", [int(peak > 0) for peak in peaks])
    wire.assert_same("step", torch.tensor([one.step for one in flags]))
    stepped_before = any(one.executed_before for one in flags)
    bases.some_replica_has_stepped = stepped_before or any(one.executed_now for one in flags)
    givers = [m for m, one in enumerate(flags) if one.gives_gradient]
    if not givers or (stepped_before and not first_basis_due(bases.config, step)):
        return
    for item, moved in zip(waiting, moves.T, strict=True):
        mean = torch.zeros_like(item.weight)
        if bool(moved[givers].any()):
            if gives and item.waiting.gradient is not None:
                mean.copy_(item.waiting.gradient)
            wire.sum_(mean, "first_basis").div_(len(givers))
        bases.refresh(item, mean, step)
        if bases.at_owners and item.has_basis:
            wire.broadcast_(item.basis, "first_basis")  # replica 0's, however the others' hardware rounds
    bases.say(step)


def first_bases_bytes(bases: Bases, wire: ReplicaWire) -> int:
    """Bytes that this rank sends across replicas in a step that gives all matrices their first bases."""
    links = Links(wire.replicas, wire.twins.size, wire.index, wire.twins.index)
    return first_basis_bytes(bases.config, [item.holding for item in bases.items], links, FirstBasisFlags.width())


def _peaks(items: Sequence[Fragment]) -> list[float]:
    """Largest absolute value of each item's gradient on this rank; nan or inf where it is not finite."""
    peaks = [0.0] * len(items)
    gradients = [item.waiting.gradient for item in items]
    given = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None and items[i].numel]
    if given:
        norms = torch._foreach_norm([gradient for _, gradient in given], float("inf"))
        for (i, _), peak in zip(given, torch.stack(list(norms)).tolist(), strict=True):
            peaks[i] = peak
    return peaks
