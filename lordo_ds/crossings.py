"""What crosses replicas, and when: at the end of an attempted step, in a final sync, before a save."""

from __future__ import annotations

from typing import Protocol

from lordo_ds.config import LordoConfig
from lordo_ds.core.schedule import final_plan
from lordo_ds.replica.steps import Steps
from lordo_ds.sync.outer_sync import OuterSync
from lordo_ds.watch.unwatched import Unwatched


class Run(Protocol):
    """What is read of the optimizer, and counted in it: see `LoRDO`."""

    config: LordoConfig
    sync: OuterSync | None
    watchdog: Unwatched
    attempted_steps: int
    executed_steps: int


def end_step(run: Run, steps: Steps, executed_now: bool) -> bool:
    """First bases, a sync that lands, one that is launched or run; whether weights changed. Collective.

    Args:
        executed_now: whether this replica executed the step that ends.
    """
    assert run.sync is not None
    sync, step, changed = run.sync, run.attempted_steps, False
    plan = steps.schedule.plan(step)
    if plan.due or run.executed_steps <= 1:
        sync.check_copies(step)
    if sync.bases.wait_for_all_replicas(step):
        sync.first_bases(step, run.executed_steps - executed_now, executed_now)
        changed |= steps.take_deferred(step)
    if sync.streaming.lands_at(step):
        changed |= _land(run)
    if plan.due and plan.fragment is not None and sync.streaming.delay_steps:
        sync.launch(plan, step, run.executed_steps, executed_now)
    elif plan.due:
        run.executed_steps = sync.run(plan, step, run.executed_steps, executed_now)
        changed = True
    return changed


def _land(run: Run) -> bool:
    """End the sync that is in flight; whether there was one."""
    assert run.sync is not None
    if run.sync.streaming.flight is None:
        return False
    with run.watchdog.in_flight(run.sync.streaming.thread):
        run.sync.streaming.wait()
    run.executed_steps += run.sync.land(run.attempted_steps)
    return True


def drain(run: Run, before_load: bool) -> bool:
    """See `LoRDO.drain`."""
    if run.sync is None or run.sync.streaming.flight is None:
        return False
    if not before_load:
        run.sync.refuse_changed(run.attempted_steps)
    with run.watchdog.at_the_end_of(run.attempted_steps):
        _land(run)
    run.watchdog.synced(run.attempted_steps)
    run.sync.outside.record()
    return True


def finish(run: Run) -> bool:
    """Sync everything, unless the last step did, and average the rows; whether weights changed. Collective."""
    assert run.sync is not None
    sync, step = run.sync, run.attempted_steps
    with run.watchdog.at_the_end_of(step):
        done = 0 < step == sync.last_synced_step
        if done:
            sync.flush_rows()
        else:
            _land(run)
            run.executed_steps = sync.run(final_plan(run.config, step), step, run.executed_steps, executed_now=False)
    if not done:
        run.watchdog.synced(step)
    sync.outside.record()
    return not done
