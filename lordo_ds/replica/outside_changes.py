"""Weights that somebody else has changed since the last step: loaded, swapped or rewritten by the user's own code.

The next sync would take "new minus old" for what training did. So a few elements of every weight are kept at the end of
a step and compared before the next one; what was swapped in and back again is equal then. Nothing is communicated: the
header of the next sync tells whether all replicas were given the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lordo_ds.comm.checksum import checksum
from lordo_ds.comm.inside import InsideComm, InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.core.finite import all_finite
from lordo_ds.core.state import MOMENTA, WIRE_ERRORS
from lordo_ds.errors import ConfigError, SyncError
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.model_copy import ModelCopy
from lordo_ds.replica.samples import Samples

logger = logging.getLogger("lordo_ds")

# Relative to the weight's norm. What a loop of the user's own does after every step (clamping, normalising) is smaller.
_LOADED = 0.1
_DIGEST_BITS = 40  # those of all ranks of a replica are added up in 63


class OutsideChanges:
    """Compares weights with those that the last step left, and takes over what was changed.

    A change is a *load* where it is large, or where the replicas were equal (after a sync, before the first step) and
    the step before had seen none: the anchor then is what was loaded, and the outer momentum starts anew. Other small
    changes count as what training does: a loop may clamp or normalise its weights after every step.
    """

    def __init__(self, items: Sequence[Fragment], wire: ReplicaWire, inside: InsideReplica) -> None:
        self.items, self.inside = list(items), inside
        self._shapes = [item.tensor_shape for item in self.items]
        self._copies: dict[int, ModelCopy] = {}
        self._check_model: Callable[[bool], None] = lambda all_of_it: None
        self.same_on: InsideComm = wire.twins
        self._kept: tuple[Samples, Samples] | None = None
        self._tokens: list[object] = []
        self._checked = self._changed_before = False
        self._late: Tensor | None = None
        # Called with the parameters that were loaded, before their anchors change: a sync may be working with them.
        self.before_load: Callable[[Sequence[Fragment]], None] = lambda items: None
        # Of what was loaded since the last sync: digests of what a rank has whole and of all it has, and a name.
        self._whole, self._all, self.first_loaded = 0, 0, ""

    def watch(
        self, copies: Mapping[str, ModelCopy], check_model: Callable[[bool], None], same_on: InsideComm | None
    ) -> None:
        """The model computes with tensors of its own.

        Args:
            copies: by parameter, of those that have one.
            check_model: refuses a model whose parameters are no longer those that are stepped; its argument asks it to
                look at all of them.
            same_on: the ranks of this replica that hold the same copies; default: those that step the same.
        """
        self._copies = {i: copies[item.plan.name] for i, item in enumerate(self.items) if item.plan.name in copies}
        self._check_model = check_model
        if same_on is not None:
            self.same_on = same_on

    # -- between two steps ---------------------------------------------------------------------------

    def record(self) -> None:
        """These are the weights that the next step must find."""
        self._kept, self._tokens, self._checked = self._samples(), self._seen(), False

    def forget(self) -> None:
        """The next step may find any weights: a state was loaded, and those that belong to it come before or after."""
        self._kept, self._checked = None, False

    @torch.no_grad()
    def check(self, step: int, equal: bool) -> None:
        """Take over what was changed since `record`; a second call changes nothing. Nothing is communicated.

        Args:
            step: the attempted step that begins.
            equal: the replicas hold equal weights, unless somebody changed them.

        Raises:
            ConfigError: a parameter has another shape, or another object has taken its place.
        """
        if self._kept is None or self._checked:
            return
        for item, shape in zip(self.items, self._shapes, strict=True):
            if item.tensor_shape != shape:
                raise ConfigError(
                    f"LoRDO: {item.plan.name} is {tuple(item.tensor_shape)} at step {step}, and was {tuple(shape)} "
                    "when its training was set up: resize the model before deepspeed.initialize, or before the "
                    "optimizer is made"
                )
        self._check_model(equal)
        self._checked = True
        stepped, copies = now = self._samples()
        if not (stepped.on_host and copies.on_host) and self._tokens == self._seen():
            # On an accelerator nobody waits for the answer: a write that left no trace is refused at the next sync.
            flags = [stepped.differs(self._kept[0]), copies.differs(self._kept[1])]
            late = torch.stack([flag.to(self.inside.device) for flag in flags]).any()
            self._late = late if self._late is None else self._late | late
            return
        sizes = stepped.changes(self._kept[0])
        in_model = {i: size for i, size in copies.changes(self._kept[1]).items() if i not in sizes}
        self._take_over_(sizes, in_model, step, equal, now)

    def _take_over_(
        self,
        stepped: Mapping[int, float],
        in_model: Mapping[int, float],
        step: int,
        equal: bool,
        now: tuple[Samples, Samples],
    ) -> None:
        """Args: how far stepped tensors moved, and model's copies of others; the rest as in `check`."""
        sizes = {**stepped, **in_model}
        load = bool(sizes) and (max(sizes.values()) > _LOADED or (equal and not self._changed_before))
        told = bool(sizes) and (load or not self._changed_before)
        self._changed_before = bool(sizes)
        for i in in_model:
            # Where the replicas have moved apart they keep nothing of their own, or the new anchors would differ.
            self._adopt_copy_(i, whole=load and not equal)
        # What is not finite nobody loads: the next sync leaves this replica out, and needs the anchor.
        new = [i for i in sorted(sizes) if load and all_finite([self.items[i].weight])]
        if new:
            self.before_load([self.items[i] for i in new])
        for i in new:
            state = self.items[i].state
            if "anchor" in state:
                state["anchor"].copy_(self.items[i].weight)
            for name in (*MOMENTA, *WIRE_ERRORS):
                if name in state:
                    state[name].zero_()
            self._whole = _digest(self._whole, i, now[i in self._copies].of(i))
            self._all = _digest(self._all, i, now[i in in_model].of(i))
            self.first_loaded = self.first_loaded or self.items[i].plan.name
        if told:
            logger.warning(
                "LoRDO: the weights of %d parameters, the first %s, were changed outside a step before step %d: %s",
                len(sizes), self.items[min(sizes)].plan.name, step,
                "training goes on from them, with a new anchor" if new
                else "they are not finite" if load else "a small change counts as training",
            )  # fmt: skip

    def _adopt_copy_(self, index: int, whole: bool) -> None:
        """Give the stepped tensor the model's values: all, or those that are not its own rounded ones."""
        weight = self.items[index].weight
        held = self._copies[index].held().to(weight.device)
        own = (weight.to(held.dtype) == held) & (not whole)
        weight.copy_(torch.where(own, weight, held.to(weight.dtype)))

    # -- at a sync -----------------------------------------------------------------------------------

    def header_fields(self) -> list[int]:
        """What the other replicas must have been given too; and what is wrong. Collective inside the replica."""
        wrong = 0
        if self._late is not None and bool(self._late):
            wrong = 2
        if self.same_on.size > 1:
            rows = self.same_on.gather(self.inside.vector([self._whole]), "flags")
            wrong = wrong or int(not bool((rows == rows[0]).all()))
        sums = self.inside.vector([self._all, int(wrong == 1), int(wrong == 2)])
        total, apart, late = self.inside.everyone.sum_(sums, "flags").tolist()
        return [total, 2 if late else int(apart > 0)]

    def start_anew(self) -> None:
        """The replicas were found to be given the same."""
        self._whole, self._all, self.first_loaded, self._late = 0, 0, "", None

    def unchanged(self) -> bool:
        """Whether the weights are those that the last step left. Nothing is communicated."""
        if self._kept is None:
            return True
        stepped, copies = self._samples()
        return not stepped.changes(self._kept[0]) and not copies.changes(self._kept[1])

    # -- what is looked at ---------------------------------------------------------------------------

    def _samples(self) -> tuple[Samples, Samples]:
        widths = [item.plan.shape[-1] if item.plan.shape else 1 for item in self.items]
        stepped = Samples((i, item.weight, widths[i]) for i, item in enumerate(self.items))
        return stepped, Samples((i, copy.whole(), widths[i]) for i, copy in self._copies.items())

    def _seen(self) -> list[object]:
        return [item.token for item in self.items] + [copy.token() for copy in self._copies.values()]


def _digest(before: int, index: int, *samples: Tensor) -> int:
    """Never 0, which says that nothing was changed."""
    return (before * 1_000_003 + (index + 1) * 7_919 + checksum(samples)) % (1 << _DIGEST_BITS) or 1


def check_loads(fields: Tensor, taking_part: Sequence[bool], step: int, first_loaded: str) -> None:
    """Refuse weights that not all replicas were given. Of those that take no part nobody learns anything.

    Args:
        fields: (replicas, 2), everybody's `OutsideChanges.header_fields`.
        first_loaded: a parameter that this replica was given.

    Raises:
        SyncError: on all ranks, before any weight has travelled.
    """
    chosen = fields[torch.tensor(list(taking_part), dtype=torch.bool)]
    which = f" (here {first_loaded})" if first_loaded else ""
    if bool((chosen[:, 1] == 2).any()):
        raise SyncError(
            f"LoRDO: weights were changed outside a step before step {step} through .data, which leaves no trace "
            "on an accelerator: write to the parameter itself under torch.no_grad()"
        )
    if bool(chosen[:, 1].any()) or bool((chosen[:, 0] != chosen[:1, 0]).any()):
        replicas = [m for m, taken in enumerate(taking_part) if taken and int(fields[m, 0])]
        raise SyncError(
            f"LoRDO: weights were changed outside a step since the last sync on replicas {replicas}{which}, and "
            f"not alike on all ranks, found at step {step}: load the same weights on every rank, before the first "
            "step or right after a sync, or use load_checkpoint"
        )
