"""A saved run seen with another number of replicas, and parameters' states with another rank.

At a sync the replicas hold equal weights, and every count of replicas can go on from them exactly. Between syncs they
have moved apart: another count starts from their mean, with the anchor of the last sync, so that the next sync sees
all of the movement since then. With the same count every replica goes on from its own state, exactly.

What each replica keeps for itself (moments that are not averaged, error feedback) is taken from one old replica when
there are more than before, new replica m from old m mod M; with fewer, each takes the mean over old m, m + M', ...
What owners keep is of all replicas: replica 0 is given the sum, and who loads it takes his part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lordo_ds.checkpoint.header import Counters
from lordo_ds.checkpoint.pieces import State
from lordo_ds.checkpoint.run import EngineState, SavedParameter, SavedRun
from lordo_ds.core.basis import fill_up
from lordo_ds.core.inner import rescale_bias_correction
from lordo_ds.core.state import BY_NAME, OWNED
from lordo_ds.errors import CheckpointError


class ReshapedRun(SavedRun):
    """`run` with `replicas` replicas, and a rank of at most `rank` where it is given."""

    def __init__(self, run: SavedRun, replicas: int, rank: int | None = None) -> None:
        if replicas < 1:
            raise CheckpointError(f"LoRDO: {replicas} replicas: must be at least 1")
        self.run, self.replicas = run, replicas
        self.path: Path = run.path
        self.mesh = run.mesh
        self.settings = dict(run.settings)
        self.parameters = dict(run.parameters)
        self.rank = rank
        if rank is not None:
            if rank < 1:
                raise CheckpointError(f"LoRDO: rank {rank}: must be at least 1")
            self.settings["rank"] = rank
            self.parameters = {name: _with_rank(one, rank) for name, one in run.parameters.items()}
        self.averages = replicas != run.replicas and not run.synced
        self._finite = list(range(run.replicas))
        if self.averages:
            self._finite = [m for m in self._finite if _is_finite(run, m)]
            if not self._finite:
                raise CheckpointError(f"LoRDO: {run.path}: no replica's weights are finite: choose another tag")

    @property
    def notes(self) -> list[str]:
        """What a user should know about how exact it is."""
        found = []
        if self.averages:
            step = self.run.counters(0).attempted_steps
            found.append(
                f"step {step} is between syncs: the {self.replicas} replicas start from the mean of the weights of "
                f"{len(self._finite)}"
            )
            if len(self._finite) < self.run.replicas:
                found.append("replicas whose weights are not finite were left out of it")
        if self.rank is not None and self.rank != self.run.settings.get("rank"):
            found.append(f"rank {self.run.settings.get('rank')} becomes {self.rank}")
        return found

    def _sources(self, replica: int) -> list[int]:
        """Old replicas that a new one takes its own state from."""
        old = self.run.replicas
        if self.replicas == old:
            return [replica]
        mine = [m for m in range(old) if m % self.replicas == replica] or [replica % old]
        return [m for m in mine if m in self._finite] or self._finite[:1]

    def state(self, name: str, replica: int) -> State:
        sources = self._sources(replica)
        states = {m: self.run.state(name, m) for m in sources}
        first = states[sources[0]]
        if self.replicas != self.run.replicas:
            first = mean_state(list(states.values()), self._betas(sources[0]))
            if self.averages:  # the other replicas' weights are read here, and no state twice
                weights = {m: state["weight"] for m, state in states.items()}
                first["weight"] = _mean(
                    [weights[m] if m in weights else self.run.state(name, m)["weight"] for m in self._finite]
                )
        for key in [key for key in OWNED if key in first]:
            kept = [self.run.state(name, m)[key] for m in range(self.run.replicas if replica == 0 else 0)]
            first = {**first, key: sum(kept, torch.zeros_like(first[key]))}
        return with_rank(first, self.parameters[name])

    def check_state(self, name: str, replica: int) -> None:
        for m in {*self._sources(replica), *(self._finite if self.averages else ())}:
            self.run.check_state(name, m)

    def _betas(self, replica: int) -> tuple[float, float]:
        groups = self.run.engine_state(replica).param_groups
        first, second = groups[0].get("betas", (0.9, 0.999)) if groups else self.settings.get("betas", (0.9, 0.999))
        return float(first), float(second)

    def counters(self, replica: int) -> Counters:
        sources = [self.run.counters(m) for m in self._sources(replica)]
        return sources[0].model_copy(update={"executed_steps": max(one.executed_steps for one in sources)})

    def bytes_sent(self, replica: int) -> dict[str, int]:
        return self.run.bytes_sent(self._sources(replica)[0])

    def rows(self) -> list[list[float]]:
        return self.run.rows()

    def untrained(self, replica: int) -> dict[str, Tensor]:
        return self.run.untrained(self._sources(replica)[0])

    def engine_state(self, replica: int) -> EngineState:
        """That of the source that executed most steps, like the count: its schedule is the furthest."""
        return self.run.engine_state(max(self._sources(replica), key=lambda m: self.run.counters(m).executed_steps))


def mean_state(states: list[State], betas: tuple[float, float]) -> State:
    """One replica's state from several: means of what each kept for itself; equal values stay as they are.

    Moments are averaged with their bias corrections, as a sync does. Where the replicas have bases of their own there
    is no mean of what is expressed in them: those moments and the basis are the first one's.
    """
    first = dict(states[0])
    if len(states) == 1:
        return first
    own_bases = "basis" in first and not all(torch.equal(first["basis"], one["basis"]) for one in states[1:])
    step = max(int(one["step"]) for one in states)
    for name, tensor in first.items():
        if not isinstance(tensor, Tensor) or name in ("weight", "anchor", "outer_momentum", "basis"):
            continue
        which = BY_NAME[name].beta if name in BY_NAME else None
        if which is not None:
            if own_bases:
                continue
            scales = [rescale_bias_correction(betas[which], int(one["step"]), step) for one in states]
            first[name] = _mean([one[name] * scale for one, scale in zip(states, scales, strict=True)])
        else:
            first[name] = _mean([one[name] for one in states])
    if not own_bases:
        first["step"] = step
    return first


def _mean(tensors: list[Tensor]) -> Tensor:
    if all(torch.equal(tensors[0], other) for other in tensors[1:]):
        return tensors[0]
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)


def _is_finite(run: SavedRun, replica: int) -> bool:
    return all(bool(torch.isfinite(run.state(name, replica)["weight"]).all()) for name in run.parameters)


# -- rank --------------------------------------------------------------------------------------------


def _with_rank(parameter: SavedParameter, rank: int) -> SavedParameter:
    if not parameter.low_rank:
        return parameter
    rank = min(rank, *parameter.shape)
    return SavedParameter(parameter.name, parameter.shape, True, parameter.side, rank)


def with_rank(state: State, parameter: SavedParameter) -> State:
    """A state with `parameter.rank` columns in its basis.

    Fewer: the leading ones, which carry most, and the moments of theirs. More: orthonormal columns are added, with no
    momentum. Their second moment is the mean of the others in the column of the matrix: a zero, which the bias
    correction of t steps does not expect, would make the first steps in the new directions several times too long.
    """
    if not parameter.low_rank or state["basis"].shape[1] == parameter.rank:
        return state
    old, new = state["basis"].shape[1], parameter.rank
    state = dict(state)
    if new < old:
        state["basis"] = state["basis"][:, :new].contiguous()
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"][:new], state["exp_avg_sq"][:new]
        return state
    basis, more = state["basis"], new - old
    if state["has_basis"]:
        state["basis"] = fill_up(basis, None, new)
    else:
        state["basis"] = basis.new_zeros(basis.shape[0], new)
    u, v = state["exp_avg"], state["exp_avg_sq"]
    state["exp_avg"] = torch.cat([u, u.new_zeros(more, u.shape[1])])
    state["exp_avg_sq"] = torch.cat([v, v.mean(dim=0, keepdim=True).expand(more, -1)])
    return state


# -- what a run must share with a saved one to go on from it -----------------------------------------


def check_settings(saved: dict[str, Any], here: dict[str, Any], where: str) -> None:
    """Refuse settings that the saved state cannot be turned into.

    Raises:
        CheckpointError: the key, both values, and what to do.
    """

    def refuse(key: str, why: str) -> None:
        raise CheckpointError(
            f"LoRDO: {where} was saved with optimizer.params.{key} = {saved.get(key)!r}, this run has "
            f"{here.get(key)!r}: {why}: use the saved value, or load the weights only"
        )

    if here.get("qh_mode") == "factored" and saved.get("qh_mode") != "factored":
        refuse("qh_mode", "it needs row and column means, which were not kept")
    if here.get("projection") == "global" and saved.get("projection") == "local":
        refuse("projection", "every replica was saved with a basis of its own")
