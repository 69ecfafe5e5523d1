"""Which attempted steps end in a sync, and what that sync does. Plain integers, equal on every rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lordo_ds.config import LordoConfig

# Until then every step may give a matrix its first basis: longer than any chain of layers that start at zero.
FIRST_STEPS = 8


@dataclass(frozen=True)
class SyncPlan:
    """What the sync at the end of one attempted step does.

    `fragment` is the one fragment of the model that syncs (`streaming`), None for all of it.
    """

    due: bool
    fragment: int | None = None
    plain_average: bool = False
    refresh_basis: bool = False
    average_exp_avg: bool = False
    average_exp_avg_sq: bool = False

    def averages(self, beta: int) -> bool:
        """Whether running averages that follow that one of the two betas are averaged over the replicas."""
        return self.average_exp_avg_sq if beta else self.average_exp_avg


def sync_plan(config: LordoConfig, step: int) -> SyncPlan:
    """The sync at the end of attempted step `step` (counted from 1).

    The first `sync_warmup_steps` steps average weights and moments every time, by plain averaging; the
    basis is refreshed only at multiples of `sync_interval`. After them, multiples of `sync_interval` are due; with
    streaming each fragment of the model at its own step before one, the last fragment at it.
    """
    warming_up = step <= config.sync_warmup_steps
    if config.streaming.is_on and not warming_up:
        fragment = fragment_due(config, step)
        if fragment is None:
            return SyncPlan(due=False)
        round_end = -(-step // config.sync_interval) * config.sync_interval
        return replace(_plan(config, round_end, warming_up=False, on_interval=True), fragment=fragment)
    on_interval = step % config.sync_interval == 0
    if not (warming_up or on_interval):
        return SyncPlan(due=False)
    return _plan(config, step, warming_up, on_interval)


def fragment_due(config: LordoConfig, step: int) -> int | None:
    """Which fragment syncs at the end of attempted step `step`: their steps lie evenly in every `sync_interval`."""
    fragments, place = config.streaming.fragments, step % config.sync_interval or config.sync_interval
    due = [(f + 1) * config.sync_interval // fragments for f in range(fragments)]
    return due.index(place) if place in due else None


class Schedule:
    """The plans of a run's steps. That of the attempt in hand is made once, for all who ask, and then forgotten.

    By the number of the step: a load, or replicas that others join, may set a run to another step at any time.
    """

    def __init__(self, config: LordoConfig) -> None:
        self._config = config
        self._step, self._plan = -1, SyncPlan(due=False)  # no step yet

    def plan(self, step: int) -> SyncPlan:
        """`sync_plan` of attempted step `step` (counted from 1)."""
        if step != self._step:
            self._step, self._plan = step, sync_plan(self._config, step)
        return self._plan


def first_basis_due(config: LordoConfig, step: int) -> bool:
    """Whether a matrix that still has no basis may get its first one in attempted step `step`.

    The run's first executed step always may. A matrix behind one that starts at zero (LoRA's A, what comes before a
    zero-initialised projection) has its first gradient a few steps later; one that never has any must not make every
    step ask the other replicas: after the first steps those at powers of two do, and those that sync anyway.
    """
    return step <= FIRST_STEPS or step & (step - 1) == 0 or sync_plan(config, step).due


def final_plan(config: LordoConfig, step: int) -> SyncPlan:
    """A sync forced at `step`, as at the end of training; no gradient was kept for it to refresh a basis from."""
    return _plan(config, step, step <= config.sync_warmup_steps, config.basis_source != "gradient")


def _plan(config: LordoConfig, step: int, warming_up: bool, on_interval: bool) -> SyncPlan:
    shared_moments = config.projection == "global"
    average = [
        shared_moments and interval > 0 and (warming_up or step % interval == 0)
        for interval in config.moment_sync_intervals
    ]
    return SyncPlan(
        due=True,
        plain_average=warming_up or config.outer.is_plain_average,
        refresh_basis=on_interval,
        average_exp_avg=average[0],
        average_exp_avg_sq=average[1],
    )


def steps_until_sync(config: LordoConfig, step: int) -> int:
    """Attempted steps from `step` (already done) to the end of the next one that is due, >= 1."""
    if step < config.sync_warmup_steps:
        return 1
    if config.streaming.is_on:
        ahead = range(1, config.sync_interval + 1)
        return next(n for n in ahead if fragment_due(config, step + n) is not None)
    return config.sync_interval - step % config.sync_interval
