"""`LoRDO`, a `torch.optim.Optimizer`: the inner step on the tensors it is given, and the sync when due."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lordo_ds import alone, saved_state
from lordo_ds.checkpoint.header import OWN_FILE_HINT, EngineFacts, Header
from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.amp import unscale_or_skip
from lordo_ds.core.fragments import FlatTensor
from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.core.schedule import final_plan, steps_until_sync
from lordo_ds.replica.allocate import Held, allocate, fragment_of_each
from lordo_ds.replica.copies import TiedWeight
from lordo_ds.replica.model_size import ModelSize, model_size
from lordo_ds.replica.steps import Steps
from lordo_ds.sync.background import BackgroundGroups
from lordo_ds.sync.made_up_step import only_makes_state
from lordo_ds.sync.outer_sync import OuterSync
from lordo_ds.sync.report import SyncReport
from lordo_ds.watch.unwatched import Unwatched
from lordo_ds.watch.watchdog import watch_ranks


class LoRDO(torch.optim.Optimizer):
    """Low-rank Adam on every replica, averaged every `sync_interval` steps. LoRDO, arXiv 2602.04396.

    Used through DeepSpeed (`"optimizer": {"type": "LoRDO", "params": {...}}`), the engine's hook runs the sync at the
    end of each attempted step. Used alone, in one process or under `torch.distributed`, `step()` does it: every rank
    (or every `replica_size` ranks) is a replica, and no gradient is averaged by this class; ranks of one replica
    average theirs first, as with DistributedDataParallel over the replica's ranks.

    Args:
        params: the model (its parameters that require a gradient), or parameters, parameter groups or named
            parameters; fp32 or fp64 (low-precision training keeps full-precision masters, as DeepSpeed's bf16 and
            fp16 modes do). Groups may set lr, betas, eps and weight_decay of their own.
        model: the module that `params` belong to. It tells embeddings, position tables and tied heads from other
            matrices; without it their names do, as far as they can, and 2-D tensors without a name are projected.
        **settings: the keys of the JSON block, see `lordo_ds.LordoConfig`.

    Raises:
        ConfigError: an unknown or illegal key, named with its nearest legal value.
    """

    _step_supports_amp_scaling = True  # GradScaler then calls `step()` after an overflow too: see `unscale_or_skip`

    def __init__(self, params: nn.Module | Iterable[Any], model: nn.Module | None = None, **settings: Any) -> None:
        self.config = LordoConfig.parse(settings, path="")
        given, self._model = alone.given_model(params, model)
        # Set by the engine adapter: step() then does nothing until `attach`, and never syncs by itself.
        self.managed = False
        self.attempted_steps = self.executed_steps = 0
        self.sync: OuterSync | None = None
        self.watchdog = Unwatched()
        self.held = Held()  # what this rank holds of the model
        self.model_size = ModelSize()
        # What the engine adapter knows of the files that this state goes into.
        self.engine_facts = EngineFacts()
        self.resume_hint = OWN_FILE_HINT
        self.pipe_stage, self.pipe_stages = 0, 1
        self._steps: Steps | None = None
        self._executed_now = self.last_attempt_executed = self._first_attempt = False
        super().__init__(given, {key: getattr(self.config, key) for key in ("lr", "betas", "eps", "weight_decay")})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, before the first step only: the replicas agree on their parameters once."""
        if self.sync is not None:
            raise ValueError("LoRDO: parameters cannot be added after the first step: give all of them at the start")
        super().add_param_group(param_group)

    # -- attaching to parameters and replicas --------------------------------------------------------

    def attach(
        self,
        flats: Sequence[FlatTensor],
        wire: ReplicaWire,
        inside: InsideReplica | None = None,
        tied: Sequence[TiedWeight] = (),
        resuming: bool = False,
        background: BackgroundGroups | None = None,
    ) -> None:
        """Plan every parameter and allocate its state. Collective: the replicas' weights are made equal.

        Args:
            flats: the tensors in `param_groups` and the parameters inside them; the order of the parameters is
                equal on all ranks that hold parts of them. With tensor parallelism the facts say which are sliced.
            wire: the replica group.
            inside: the groups inside this replica; default: this rank is the replica.
            tied: weights of which other pipeline stages hold copies.
            resuming: a saved state comes next; every replica keeps the weights that it has loaded.
            background: the same groups once more, for syncs beside training (`streaming` with a delay).

        Raises:
            ConfigError: a parameter that cannot be stepped, or another layout on another tensor-parallel rank.
        """
        inside = inside or InsideReplica()
        if self.watchdog.stopped:
            self.watchdog = watch_ranks(self.config.sync_timeout_s, owner=self)
        self.watchdog.follow(wire, inside, () if background is None else [background.wire, background.inside.shard])
        with self.watchdog.starting():
            self.held = allocate(self.config, flats, self.param_groups, self.state, inside, tied)
            self.model_size = model_size(self.held.fragments, inside)
            where = fragment_of_each(self.config, self.held, inside) if self.config.streaming.is_on else {}
            self.sync = OuterSync(
                self.config, self.held.fragments, wire, inside, tied, fragment_of=where, background=background
            )
            self._steps = Steps(self.config, self.held, self.sync.bases, inside)
            self.sync.start(resuming)
            self.sync.outside.record()

    @property
    def plans(self) -> Sequence[ParameterPlan]:
        """Of every parameter that this rank holds a part of; none before the first step."""
        return self.held.plans

    def _attach_alone(self, resuming: bool = False) -> None:
        """Without an engine: names from the model or the groups, replicas from torch.distributed. Collective."""
        self.watchdog = watch_ranks(self.config.sync_timeout_s, owner=self)  # some may be late
        with self.watchdog.starting():
            flats = alone.agreed_tensors(self, self.config, self.param_groups, self._model)
            device = flats[0].tensor.device if flats else torch.device("cpu")
            wire, inside, background = alone.replicas_of_torch(self.config, device)
        alone.prepare(self._model, flats, wire, inside, resuming)
        self.attach(flats, wire, inside, resuming=resuming, background=background)
        assert self.sync is not None
        self._first_attempt = wire.replicas > 1 and not resuming
        alone.say_start(self.config, flats, self.sync, self.model_size)

    def _detach(self) -> None:
        """As before the first step."""
        self.watchdog.stop()
        self.watchdog, self.sync, self._steps, self.held = Unwatched(), None, None, Held()
        self.state.clear()

    # -- the inner step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One executed inner step of the tensors in `param_groups`; alone, also the sync if it is due.

        An engine may call it once for each of several groups of the same attempted step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.sync is None:
            if self.managed:
                return loss  # DeepSpeed's half-precision wrapper makes one empty call before attaching is possible
            self._attach_alone()
        assert self.sync is not None and self._steps is not None
        first = not (self.managed or self.attempted_steps)
        if first and only_makes_state(self.param_groups, self.sync.wire, self.sync.inside):
            return loss
        if not self.managed:
            self.begin_attempt()
        if unscale_or_skip(self):
            self._steps.take(self.param_groups, self.attempted_steps + 1, self.executed_steps)
            self._executed_now = True
        if not self.managed:
            self._end_alone()
        return loss

    def skip_step(self) -> None:
        """Count an attempted step that this replica leaves out, in place of `step()`; it ends in the sync that is due.

        For a loop of one's own that drops a batch on one replica. A GradScaler's overflow counts by itself.
        """
        if self.managed:
            raise ValueError("LoRDO: skip_step() is for an optimizer used alone: here the engine counts the attempts")
        if self.sync is None:
            self._attach_alone()
        self._end_alone()

    def _end_alone(self) -> None:
        """The end of an attempt that no engine counts."""
        if self._first_attempt:
            self._first_attempt = False
            alone.warn_of_equal_gradients(self.param_groups if self._executed_now else [])
        self.end_attempt()

    # -- around an attempted step --------------------------------------------------------------------

    def begin_attempt(self) -> None:
        """Take over weights that were changed since the last step; an engine calls it before its own step.

        Raises:
            ConfigError: a parameter was resized or replaced.
        """
        assert self.sync is not None
        self.sync.outside.check(self.attempted_steps + 1, equal=self.attempted_steps == self.sync.last_synced_step)

    @torch.no_grad()
    def end_attempt(self) -> bool:
        """Count one attempted step and do what crosses replicas at its end. Collective; all replicas call it.

        Returns:
            Whether weights changed after `step()`: low-precision copies must then be refreshed.
        """
        assert self.sync is not None
        if not self._executed_now:
            self.begin_attempt()
        self.attempted_steps += 1
        self.executed_steps += self._executed_now
        with self.watchdog.at_the_end_of(self.attempted_steps):
            changed = self.sync.members.around(self.cross_replicas)
        if self.synced:
            self.watchdog.synced(self.attempted_steps)
        self.last_attempt_executed, self._executed_now = self._executed_now, False
        if self.managed:
            self.sync.outside.forget()  # until the engine has given the model its weights, and records them
        else:
            self.sync.outside.record()
        return changed

    def cross_replicas(self) -> bool:
        """What `Members.around` runs at the end of an attempted step; whether weights changed. Collective."""
        assert self.sync is not None and self._steps is not None
        sync, step, changed = self.sync, self.attempted_steps, False
        plan = self._steps.schedule.plan(step)
        if plan.due or self.executed_steps <= 1:
            sync.check_copies(step)
        if sync.bases.wait_for_all_replicas(step):
            sync.first_bases(step, self.executed_steps - self._executed_now, self._executed_now)
            changed |= self._steps.take_deferred(step)
        if sync.streaming.lands_at(step):
            changed |= self._land()
        if plan.due and plan.fragment is not None and sync.streaming.delay_steps:
            sync.launch(plan, step, self.executed_steps, self._executed_now)
        elif plan.due:
            self.executed_steps = sync.run(plan, step, self.executed_steps, self._executed_now)
            changed = True
        return changed

    def _land(self) -> bool:
        """End the sync that is in flight; whether there was one."""
        assert self.sync is not None
        if self.sync.streaming.flight is None:
            return False
        with self.watchdog.in_flight(self.sync.streaming.thread):
            self.sync.streaming.wait()
        self.executed_steps += self.sync.land(self.attempted_steps)
        return True

    @torch.no_grad()
    def drain(self, before_load: bool = False) -> bool:
        """End the sync in flight now (`streaming.delay_steps`): before weights and states are saved. Collective.

        An engine's save, a load and a final sync do it themselves. A run that did not is another trajectory.

        Args:
            before_load: whatever the weights are now, others will be in their place; else other ones are refused.

        Returns:
            Whether weights changed.
        """
        if self.sync is None or self.sync.streaming.flight is None:
            return False
        if not before_load:
            self.sync.refuse_changed(self.attempted_steps)
        with self.watchdog.at_the_end_of(self.attempted_steps):
            self._land()
        self.watchdog.synced(self.attempted_steps)
        self.sync.outside.record()
        return True

    @torch.no_grad()
    def final_sync(self) -> bool:
        """Sync everything now unless the last attempted step did, and average the recorded rows. Collective.

        Returns:
            Whether weights changed.
        """
        if self.sync is None:
            raise ValueError("LoRDO: final_sync() comes after the first step: this optimizer has made none")
        return self.sync.members.around(self._final_sync, final=True)

    def _final_sync(self) -> bool:
        assert self.sync is not None
        self.begin_attempt()
        with self.watchdog.at_the_end_of(self.attempted_steps):
            if self.replicas_equal:
                self.sync.flush_rows()
                self.sync.outside.record()
                return False
            self._land()
            plan = final_plan(self.config, self.attempted_steps)
            self.executed_steps = self.sync.run(plan, self.attempted_steps, self.executed_steps, executed_now=False)
        self.watchdog.synced(self.attempted_steps)
        self.sync.outside.record()
        return True

    def forget_attempt(self) -> None:
        """What was made since the last sync counts no more: the state of another replica is in its place."""
        assert self.sync is not None
        for fragment in self.sync.items:
            fragment.waiting.forget_gradients()
        self._executed_now = False
        self.sync.rows.pending = []

    @property
    def synced(self) -> bool:
        """Whether the last attempted step ended in a sync, of everything or of a fragment."""
        return self.sync is not None and 0 < self.attempted_steps == self.sync.landed_step

    @property
    def replicas_equal(self) -> bool:
        """Whether the last attempted step ended in a sync of everything, so that all replicas hold the same weights."""
        return self.sync is not None and 0 < self.attempted_steps == self.sync.last_synced_step

    @property
    def next_sync_in(self) -> int:
        """Attempted steps until the end of the next one that is due."""
        return steps_until_sync(self.config, self.attempted_steps)

    @property
    def last_report(self) -> SyncReport | None:
        return None if self.sync is None else self.sync.last_report

    # -- saving and loading --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: `torch.load(weights_only=True)` reads it back."""
        return {**super().state_dict(), "lordo": self.header().model_dump()}

    def header(self) -> Header:
        """What this rank's state is, and where it lies; the parameter groups must hold the stepped tensors."""
        return saved_state.header_of(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state saved by `state_dict`; every tensor keeps its own dtype.

        Without an engine, each replica loads its own state and its own weights: between syncs they differ. One that is
        not LoRDO's, of another format, or that does not fit this run is a CheckpointError; nothing is changed then.
        """
        saved_state.load(self, state_dict)

    def check_state_dict(self, state_dict: dict[str, Any]) -> Header:
        """The header of a state that fits, else a CheckpointError; the groups must hold the stepped tensors."""
        return saved_state.check(self, state_dict)
