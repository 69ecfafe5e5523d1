"""A parameter as it was when the sync of its fragment of the model began, for a sync that runs beside training.

What only syncs touch (anchor, outer momentum, what a lossy wire has not said) it shares with the parameter that is
trained; weight, moments and basis are copies. In between, a snapshot takes the memory of two of each: what the sync
began with, and what it makes of that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.core.state import MOMENTA, WIRE_ERRORS
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.waiting import Waiting

_SHARED = ("anchor", *MOMENTA, *WIRE_ERRORS)
# How what came since is turned into the new basis: coordinates by R, their squares by R's.
_TURNED = {"exp_avg": 1, "exp_avg_sq": 2}


class Snapshot(Fragment):
    """Empty but for between `take` and `land_` or `replace_`.

    Args:
        item: the parameter that is trained.
        inside: the groups that the sync runs in.
    """

    def __init__(self, item: Fragment, inside: InsideReplica) -> None:
        super().__init__(item.plan, item.weight[:0], 0, item.intervals, inside, {}, item.group, item.tied_copy)
        self.item = item
        self.loaded = False  # since then somebody gave the parameter other weights
        self._began: dict[str, Any] = {}
        self._turn: Tensor | None = None

    def take(self) -> None:
        """Freeze the parameter as it is."""
        item = self.item
        self._tensor, self.group, self.owned = item.weight.clone(), {"betas": item.betas}, item.owned
        self.state = {name: value for name, value in item.state.items() if name in _SHARED}
        self._began = {
            name: _copied(item.state[name]) for name in ("step", *(kept.name for kept, _, _ in item.moments()))
        }
        self.state |= {name: _copied(value) for name, value in self._began.items()}
        if item.plan.low_rank:
            self._began["has_basis"] = self.state["has_basis"] = item.has_basis
            self.state["basis"] = item.basis.clone()
        self._began["weight"] = item.weight.clone()
        self.waiting = Waiting(energies=item.waiting.take_energies())
        self.loaded = False

    def measure_turn(self) -> None:
        """R = Q'^T Q, from the basis that the parameter has to the one that the sync made. Collective over shards."""
        if not self.plan.low_rank or not self._began["has_basis"]:
            return
        assert self.shards is not None
        new, old = self.basis, self.item.basis  # which nobody changes in flight
        if self.shards.basis_on_rows:
            first = self.shards.rows(self.comm.index)[0]
            own = slice(*(max(0, row - first) for row in self.shards.owned_rows(self.comm.index)))
            new, old = new[own], old[own]
        self._turn = new.mT @ old
        if self.shards.basis_on_rows:
            self.comm.sum_(self._turn, "basis")

    def land_(self) -> None:
        """Give the parameter what the sync made, and keep what its steps have done since.

        Weights: W + (W_made - W_began). Moments: k steps leave b^k of what was there, so b^k made + (now - b^k began),
        the part that came since turned into the new basis; as if the sync had been there at once.
        """
        item, began = self.item, self._began
        if not self.loaded:
            item.weight.add_(self.weight - began["weight"])
        steps = item.step - int(began["step"])
        for kept, now, beta in item.moments():
            left = beta**steps
            now.sub_(began[kept.name], alpha=left)
            if self._turn is not None and kept.name in _TURNED:
                now.copy_(self._turn.pow(_TURNED[kept.name]) @ now)
            if kept.beta == 1:
                now.clamp_(min=0.0)  # squares came since; what rounding takes off them is no square
            now.add_(self.state[kept.name], alpha=left)
        item.state["step"] = self.step + steps
        if self.plan.low_rank and began["has_basis"]:
            item.basis.copy_(self.basis)
        self._empty()

    def replace_(self) -> None:
        """Give the parameter what the sync made, and nothing else: this replica had no part in it."""
        item = self.item
        if not self.loaded:
            item.weight.copy_(self.weight)
        for kept, now, _ in item.moments():
            now.copy_(self.state[kept.name])
        item.state["step"] = self.step
        if self.plan.low_rank and self.has_basis:  # the first one may have come in flight
            item.basis.copy_(self.basis)
            item.state["has_basis"] = True
        item.forget_errors_()
        self._empty()

    def _empty(self) -> None:
        self._tensor, self.state, self._began, self._turn = self.item.weight[:0], {}, {}, None
        self.waiting = Waiting()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
