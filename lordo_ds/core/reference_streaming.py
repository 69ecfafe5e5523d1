"""The part of `reference.py` that says what streaming means: syncs of one fragment, which land some steps later.

Streaming DiLoCo, arXiv 2501.18512. What is frozen when a sync begins, what it makes of that, and how the replica goes
on from both and from what it has done in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.core.schedule import SyncPlan

if TYPE_CHECKING:
    from lordo_ds.core.reference import Reference

# Weights and states of every replica, and its executed steps.
Held = tuple[list[dict[str, Tensor]], list[dict[str, dict[str, Any]]], list[int]]


@dataclass
class Flight:
    """A sync of one fragment between its two ends: what it began with and made, and the replicas that took part."""

    lands: int
    plans: list[ParameterPlan]
    finite: list[int]
    began: Held
    made: Held

    def left_out(self, replicas: int) -> list[int]:
        return [m for m in range(replicas) if m not in self.finite]


class Flights:
    """The syncs of the fragments of a `Reference`; one at most is in flight."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.flight: Flight | None = None

    def begin(self, plan: SyncPlan, gradients: list[dict[str, Tensor] | None]) -> None:
        """The sync of a fragment that is due. With a delay the replicas go on from what they had."""
        of, delay = self.reference, self.reference.config.streaming.delay_steps
        assert plan.fragment is not None
        plans = of.fragments[plan.fragment]
        began = self._held(plans)
        finite = of.sync(plan, plans, gradients)
        flight = Flight(of.n + delay, plans, finite, began, self._held(plans))
        if delay:
            self._put_back(began)
            self.flight = flight
        else:
            self._replace_rest(flight)

    def land_if_due(self) -> None:
        if self.flight is not None and self.flight.lands == self.reference.n:
            self.land()

    def land(self) -> None:
        """Each replica that took part adds what it has done since the sync began to what the sync made."""
        flight, self.flight = self.flight, None
        if flight is None:
            return
        (weights, states, before), (made_weights, made_states, after) = flight.began, flight.made
        of = self.reference
        for m in range(of.M):
            of.executed[m] += after[m] - before[m]
            for p in flight.plans:
                W, W0, W1 = of.weights[m][p.name], weights[m][p.name], made_weights[m][p.name]
                if m in flight.finite:
                    W += W1 - W0
                    self._land_state(of.state[m][p.name], states[m][p.name], made_states[m][p.name])
                else:
                    W.copy_(W1)
                    Q = of.state[m][p.name]["Q"]  # the first one may have come in flight
                    of.state[m][p.name] = made_states[m][p.name]
                    if of.state[m][p.name]["Q"] is None:
                        of.state[m][p.name]["Q"] = Q
        self._replace_rest(flight)

    def _land_state(self, now: dict[str, Any], began: dict[str, Any], made: dict[str, Any]) -> None:
        """k steps leave b^k of what u was: u <- b^k u_made + R (u - b^k u_began), v with R^2; R = Q'^T Q."""
        k, Q = now["t"] - began["t"], began["Q"]
        R = None if Q is None else made["Q"].T @ Q
        for key, beta in (("u", 0), ("v", 1), ("row", 1), ("col", 1)):
            if key in now:
                kept = self.reference.config.betas[beta] ** k
                since = now[key] - kept * began[key]
                if R is not None and key in ("u", "v"):
                    since = (R if key == "u" else R**2) @ since
                now[key] = kept * made[key] + since
        now["t"] = made["t"] + k
        if Q is not None:
            now["Q"] = made["Q"]

    def _replace_rest(self, flight: Flight) -> None:
        """A replica that was left out is replaced in the other fragments too, as it cannot go on from them."""
        of, left_out = self.reference, flight.left_out(self.reference.M)
        names = {p.name for p in flight.plans}
        for p in of.plans:
            for m in left_out if p.name not in names else ():
                of.weights[m][p.name].copy_(of.anchor[p.name])
                if flight.finite:
                    of.state[m][p.name] = adopted(of.state[flight.finite[0]][p.name])
                else:
                    of.state[m][p.name] |= {k: v for k, v in of.zeros(p).items() if k != "Q"}
        of.wire.forget(left_out)

    def _held(self, plans: list[ParameterPlan]) -> Held:
        of = self.reference
        weights = [{p.name: W[p.name].clone() for p in plans} for W in of.weights]
        return weights, [{p.name: _copy(S[p.name]) for p in plans} for S in of.state], list(of.executed)

    def _put_back(self, held: Held) -> None:
        of, (weights, states, executed) = self.reference, held
        of.executed = list(executed)
        for m in range(of.M):
            for name, W in weights[m].items():
                of.weights[m][name].copy_(W)
                of.state[m][name] = _copy(states[m][name])


def adopted(donor: dict[str, Any]) -> dict[str, Any]:
    """The state of another replica, but for the error, which belongs to weights that are no more."""
    return {key: torch.zeros_like(value) if key == "E" else value for key, value in _copy(donor).items()}


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
