"""`LoRDO`, a `torch.optim.Optimizer`: the inner step on the tensors it is given, and the sync when due."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lordo_ds import alone, crossings, saved_state
from lordo_ds.adapters.fsdp2.ranks import ranks_of
from lordo_ds.checkpoint.header import OWN_FILE_HINT, EngineFacts, Header
from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.amp import unscale_or_skip
from lordo_ds.core.fragments import FlatTensor
from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.core.schedule import steps_until_sync
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
        mesh: where `fully_shard` (FSDP2) shards each replica: a DeviceMesh with a dimension "replica", "shard" and
            "tensor" where they are used (`lordo_ds.replica_mesh`), or the replica group of this rank.
        **settings: the keys of the JSON block, see `lordo_ds.LordoConfig`.

    Raises:
        ConfigError: an unknown or illegal key, named with its nearest legal value.
    """

    _step_supports_amp_scaling = True  # GradScaler then calls `step()` after an overflow too: see `unscale_or_skip`

    def __init__(
        self, params: nn.Module | Iterable[Any], model: nn.Module | None = None, mesh: Any = None, **settings: Any
    ) -> None:
        self.config = LordoConfig.parse(settings, path="")
        given, self._model = alone.given_model(params, model)
        self.ranks = ranks_of(mesh)
        self.managed = False  # set by the engine adapter: step() does nothing until `attach`, and never syncs by itself
        self.attempted_steps = self.executed_steps = 0
        self.sync: OuterSync | None = None
        self.watchdog, self.held, self.model_size = Unwatched(), Held(), ModelSize()
        self.engine_facts, self.resume_hint = EngineFacts(), OWN_FILE_HINT  # of the files that this state goes into
        self.pipe_stage, self.pipe_stages = 0, 1
        self._steps: Steps | None = None
        self._executed_now = self.last_attempt_executed = self._first_attempt = self._starts_later = False
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
            where = fragment_of_each(self.config, self.held, inside)
            self.sync = OuterSync(self.config, self.held.fragments, wire, inside, tied, where, background)
            self._steps = Steps(self.config, self.held, self.sync.bases, inside)
            self.sync.start(resuming)
            self.sync.outside.record()

    @property
    def plans(self) -> Sequence[ParameterPlan]:
        """Of every parameter that this rank holds a part of; none before the first step."""
        return self.held.plans

    def _attach_alone(self, resuming: bool = False) -> None:
        """Without an engine: names from the model or the groups, replicas from torch.distributed. Collective."""
        self._first_attempt = alone.attach(self, self._model, resuming)

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
        if self.sync is None and self.managed:
            return loss  # DeepSpeed's half-precision wrapper makes one empty call before attaching is possible
        if not self.managed and not self._begin_alone(self.param_groups):
            return loss
        if unscale_or_skip(self):
            assert self._steps is not None
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
        self._begin_alone([{**group, "params": []} for group in self.param_groups])
        self._end_alone()

    def _begin_alone(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Begin an attempt that no engine counts; whether it is one, and not `only_makes_state`. The first attaches."""
        if self.sync is None:
            self._starts_later = not any(float(group["lr"]) for group in groups)
            self._attach_alone(resuming=self._starts_later)
        assert self.sync is not None
        if not self.attempted_steps and only_makes_state(groups, self.sync.wire, self.sync.inside):
            return False
        self.begin_attempt()
        return True

    def _end_alone(self) -> None:
        """The end of an attempt that no engine counts."""
        if self._first_attempt and self.sync is not None:
            self._first_attempt = False
            alone.warn_of_equal_gradients(self.param_groups if self._executed_now else [], self.sync.inside)
        self.end_attempt()

    # -- around an attempted step --------------------------------------------------------------------

    def begin_attempt(self) -> None:
        """Take over weights that were changed since the last step; an engine calls it before its own step.

        Raises:
            ConfigError: a parameter was resized or replaced.
        """
        assert self.sync is not None
        if self._starts_later:  # the step that attached was none, and no state came after it
            self._starts_later, self._first_attempt = False, alone.start(self, self._model)
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
        self.sync.end_step(self.attempted_steps)
        self.last_attempt_executed, self._executed_now = self._executed_now, False
        if self.managed:
            self.sync.outside.forget()  # until the engine has given the model its weights, and records them
        else:
            self.sync.outside.record()
        return changed

    def cross_replicas(self) -> bool:
        """What `Members.around` runs at the end of an attempted step; whether weights changed. Collective."""
        assert self._steps is not None
        return crossings.end_step(self, self._steps, self._executed_now)

    @torch.no_grad()
    def drain(self, before_load: bool = False) -> bool:
        """End the sync in flight (`streaming.delay_steps`), before a save; whether weights changed. Collective.

        An engine's save, a load and a final sync do it themselves. A run that does not is another trajectory.

        Args:
            before_load: whatever the weights are now, others will be in their place; else other ones are refused.
        """
        return crossings.drain(self, before_load)

    @torch.no_grad()
    def final_sync(self) -> bool:
        """Sync everything, unless the last step did, and average the rows; whether weights changed. Collective."""
        if self.sync is None:
            raise ValueError("LoRDO: final_sync() comes after the first step: this optimizer has made none")
        changed = self.sync.members.around(self._final_sync, final=True)
        self.sync.end_step(self.attempted_steps)
        return changed

    def _final_sync(self) -> bool:
        self.begin_attempt()
        return crossings.finish(self)

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
        return self.sync.last_report if self.sync else None

    # -- saving and loading --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: `torch.load(weights_only=True)` reads it back."""
        return self.ranks.pack({**super().state_dict(), "lordo": self.header().model_dump()}, self.held)

    def header(self) -> Header:
        """What this rank's state is, and where it lies; the parameter groups must hold the stepped tensors."""
        return saved_state.header_of(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state saved by `state_dict`; every tensor keeps its own dtype.

        Without an engine, each replica loads its own state and its own weights: between syncs they differ. One that is
        not LoRDO's, of another format, or that does not fit this run is a CheckpointError; nothing is changed then.
        """
        saved_state.load(self, state_dict)
        self._starts_later = not (self.managed or self.attempted_steps)

    def check_state_dict(self, state_dict: dict[str, Any]) -> Header:
        """The header of a state that fits, else a CheckpointError; the groups must hold the stepped tensors."""
        return saved_state.check(self, state_dict)
