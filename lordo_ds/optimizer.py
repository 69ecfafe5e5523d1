"""`LoRDO`, a `torch.optim.Optimizer`: the inner step on the tensors it is given, and the sync when due."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lordo_ds.alone import (
    agreed_tensors,
    dist_rank,
    equalise_model,
    given_model,
    replicas_of_torch,
    shape_alone,
    warn_of_equal_gradients,
    warn_of_missing_names,
)
from lordo_ds.checkpoint.finite import not_finite
from lordo_ds.checkpoint.header import (
    OWN_FILE_HINT,
    STATE_FORMAT,
    Counters,
    EngineFacts,
    FragmentLayout,
    Header,
    Mesh,
    refuse_differences,
)
from lordo_ds.comm.agreement import agreed, reseeded_later
from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.comm.wrapped import refuse_averaging
from lordo_ds.config import LordoConfig
from lordo_ds.core.amp import unscale_or_skip
from lordo_ds.core.fragments import FlatTensor, bucket_bounds
from lordo_ds.core.grouping import ParameterFacts, ParameterPlan, plan_parameters
from lordo_ds.core.inner import StepSettings, adamw_step_, decay_, with_error
from lordo_ds.core.schedule import final_plan, steps_until_sync, sync_plan
from lordo_ds.core.steppable import refuse_gradient, refuse_unsteppable
from lordo_ds.errors import CheckpointError, ConfigError
from lordo_ds.replica.copies import TiedWeight
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.inner_step import step_fragments_
from lordo_ds.replica.model_size import ModelSize, model_size
from lordo_ds.start_table import show_messages, start_table
from lordo_ds.sync.made_up_step import only_makes_state
from lordo_ds.sync.outer_sync import OuterSync
from lordo_ds.sync.report import SyncReport
from lordo_ds.watch.unwatched import Unwatched
from lordo_ds.watch.watchdog import watch_ranks

logger = logging.getLogger("lordo_ds")

SYNC_COUNTERS = ("syncs", "nonfinite_syncs", "left_out_syncs", "last_synced_step")
_GROUP_KEYS = ("lr", "betas", "eps", "weight_decay")
# Elements of matrices stepped together: bounds the coordinates that exist at one time.
STEP_BUCKET_NUMEL = 1 << 26


class LoRDO(torch.optim.Optimizer):
    """Low-rank Adam on every replica, averaged every `sync_interval` steps. LoRDO, arXiv 2602.04396.

    Used through DeepSpeed (`"optimizer": {"type": "LoRDO", "params": {...}}`), the engine's hook runs the
    sync at the end of each attempted step. Used alone, in one process or under `torch.distributed`,
    `step()` does it: every rank (or every `replica_size` ranks) is a replica, and no gradient is averaged
    by this class; ranks of one replica average theirs first, as with DistributedDataParallel over the
    replica's ranks.

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

    # torch.amp.GradScaler then calls `step()` after an overflow too: see `unscale_or_skip`.
    _step_supports_amp_scaling = True

    def __init__(self, params: nn.Module | Iterable[Any], model: nn.Module | None = None, **settings: Any) -> None:
        self.config = LordoConfig.parse(settings, path="")
        tensors, self._model = given_model(params, model)
        defaults = {key: getattr(self.config, key) for key in _GROUP_KEYS}
        # Set by the engine adapter: step() then does nothing until `attach`, and never syncs by itself.
        self.managed = False
        self.attempted_steps = 0
        self.executed_steps = 0
        self.sync: OuterSync | None = None
        self.watchdog = Unwatched()
        self.plans: list[ParameterPlan] = []
        self.model_size = ModelSize()
        # What the engine adapter knows of the files that this state goes into.
        self.engine_facts = EngineFacts()
        self.resume_hint = OWN_FILE_HINT
        self.pipe_stage, self.pipe_stages = 0, 1
        self._facts: dict[str, ParameterFacts] = {}
        self._fragments: dict[Tensor, list[Fragment]] = {}
        self._tied: set[str] = set()
        self._executed_now = self.last_attempt_executed = self._first_attempt = False
        super().__init__(tensors, defaults)

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
    ) -> None:
        """Plan every parameter and allocate its state. Collective: the replicas' weights are made equal.

        Args:
            flats: the tensors in `param_groups` and the parameters inside them; the order of the parameters is
                equal on all ranks that hold parts of them. With tensor parallelism the facts say which are sliced.
            wire: the replica group.
            inside: the groups inside this replica; default: this rank is the replica.
            tied: weights of which other pipeline stages hold copies.
            resuming: a saved state comes next; every replica keeps the weights that it has loaded.

        Raises:
            ConfigError: a parameter that cannot be stepped, or another layout on another tensor-parallel rank.
        """
        inside = inside or InsideReplica()
        if self.watchdog.stopped:
            self.watchdog = watch_ranks(self.config.sync_timeout_s, owner=self)
        self.watchdog.follow(wire, inside)
        with self.watchdog.starting():
            self._attach(flats, wire, inside, tied, resuming)

    def _attach(
        self,
        flats: Sequence[FlatTensor],
        wire: ReplicaWire,
        inside: InsideReplica,
        tied: Sequence[TiedWeight],
        resuming: bool,
    ) -> None:
        group_of = {tensor: group for group in self.param_groups for tensor in group["params"]}
        pieces = [(flat, piece) for flat in flats for piece in flat.pieces]
        facts = [piece.facts for _, piece in pieces]
        for flat, piece in pieces:
            refuse_unsteppable(piece.facts.name, flat.tensor)
        self.plans = plan_parameters(self.config, facts, inside.of_every_rank(facts))
        self._facts = {fact.name: fact for fact in facts}
        self._tied = {weight.name for weight in tied}
        tied_stages = {weight.name: weight.stage for weight in tied}
        precisions = {str(flat.tensor.dtype).removeprefix("torch.") for flat in flats}
        if len(precisions) > 1:
            raise ConfigError(f"LoRDO: parameters of several precisions, {sorted(precisions)}: give all in the same")
        fragments = []
        for (flat, piece), plan in zip(pieces, self.plans, strict=True):
            copied = tied_stages.get(plan.name, 0) > 0
            if plan.low_rank and plan.name in tied_stages:
                raise ConfigError(
                    f"LoRDO: {plan.name} is shared by several pipeline stages and cannot be projected: add it to "
                    f"{self.config.key('low_rank.exclude')}"
                )
            state = self.state[flat.tensor].setdefault(plan.name, {})
            fragment = Fragment(
                plan, flat.tensor, piece.offset, piece.intervals, inside, state, group_of[flat.tensor], copied
            )
            fragment.allocate(self.config)
            fragments.append(fragment)
            self._fragments.setdefault(flat.tensor, []).append(fragment)
        clipped = [plan for plan in self.plans if plan.rank_clipped]
        if clipped:
            logger.info(
                "LoRDO: rank %s is clipped to the smaller side of %d matrices, the first to %d: %s",
                self.config.rank, len(clipped), clipped[0].rank, clipped[0].name,
            )  # fmt: skip
        self._check_alike(fragments, inside)
        self.model_size = model_size(fragments, inside)
        self.sync = OuterSync(self.config, fragments, wire, inside, tied)
        if not self.sync.start(resuming):
            logger.warning("LoRDO: the replicas started from different weights; all now have those of replica 0")
        self.sync.outside.record()

    @staticmethod
    def _check_alike(fragments: Sequence[Fragment], inside: InsideReplica) -> None:
        """The slices and copies on the tensor-parallel ranks must lie in the same places: they travel together."""
        layout = repr([(f.plan.name, f.plan.shape, f.plan.rank, f.plan.partitions, f.intervals) for f in fragments])
        sums = inside.tensor.gather(inside.vector([zlib.crc32(layout.encode())]), "start")
        if not bool((sums == sums[0]).all()):
            raise ConfigError(
                "LoRDO: the tensor-parallel ranks hold other parameters than each other, or other shapes: give every "
                "rank the same model and the same parameter groups"
            )

    def _attach_alone(self, resuming: bool = False) -> None:
        """Without an engine: names from the model or the groups, replicas from torch.distributed. Collective."""
        self.watchdog = watch_ranks(self.config.sync_timeout_s, owner=self)  # some may be late
        with self.watchdog.starting():
            flats = agreed_tensors(self, self.config, self.param_groups, self._model)
            device = flats[0].tensor.device if flats else torch.device("cpu")
            wire, inside = replicas_of_torch(self.config.replica_size, device)
        if wire.replicas > 1:
            replica = dist.get_process_group_ranks(inside.rows.group)
            refuse_averaging({flat.tensor for flat in flats}, replica)
        if not resuming:
            equalise_model(self._model, flats, wire, device)
        show_messages(dist_rank())
        self.attach(flats, wire, inside, resuming=resuming)
        assert self.sync is not None
        self._first_attempt = wire.replicas > 1 and not resuming
        if dist_rank() == 0:
            warn_of_missing_names(self.plans, named=all(flat.pieces[0].facts.named for flat in flats))
            for line in start_table(self.config, shape_alone(self.sync), self.model_size, self.sync.items):
                logger.info(line)

    def _detach(self) -> None:
        """As before the first step."""
        self.watchdog.stop()
        self.watchdog, self.sync, self.plans = Unwatched(), None, []
        self._fragments.clear()
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
        assert self.sync is not None
        first = not (self.managed or self.attempted_steps)
        if first and only_makes_state(self.param_groups, self.sync.wire, self.sync.inside):
            return loss
        if not self.managed:
            self.begin_attempt()
        if unscale_or_skip(self):
            for group in self.param_groups:
                for tensor in group["params"]:
                    if tensor.grad is not None:
                        self._step_tensor(tensor, group)
            self._executed_now = True
        if not self.managed:
            self._end_alone()
        return loss

    def skip_step(self) -> None:
        """Count an attempted step that this replica leaves out, in place of `step()`; it ends in the sync that is due.

        For a loop of one's own that drops a batch on one replica. An overflow that `torch.amp.GradScaler` found counts
        by itself, as its `step()` then calls ours.
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
            gradients = [t.grad for group in self.param_groups for t in group["params"] if t.grad is not None]
            warn_of_equal_gradients(gradients if self._executed_now else [])
        self.end_attempt()

    def _step_tensor(self, tensor: Tensor, group: dict[str, Any]) -> None:
        """Step every fragment of one tensor; collective over the shard group where it is sharded."""
        assert self.sync is not None and tensor.grad is not None
        refuse_gradient(self._fragments[tensor][0].plan.name, tensor.grad)
        low_rank = []
        compares = self.executed_steps == 0 or sync_plan(self.config, self.attempted_steps + 1).due
        for fragment in self._fragments[tensor]:
            gradient = fragment.slice_of(tensor.grad)
            if compares and (fragment.duplicated or fragment.plan.name in self._tied):
                fragment.gradient_square = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
            settings = self._settings(fragment, group)
            if fragment.plan.low_rank:
                low_rank.append((fragment, gradient, settings))
            else:
                fragment.state["step"] += 1
                adamw_step_(
                    fragment.weight, gradient, fragment.state["exp_avg"], fragment.state["exp_avg_sq"], settings
                )
        self._step_low_rank(low_rank)

    def _settings(self, fragment: Fragment, group: dict[str, Any]) -> StepSettings:
        return StepSettings(
            lr=float(group["lr"]),
            betas=fragment.betas,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            omega=self.config.omega,
            residual_weight=self.config.weight_of_residual,
            qh_mode=self.config.qh_mode,
            step=fragment.step + 1,
        )

    def _step_low_rank(self, chosen: list[tuple[Fragment, Tensor, StepSettings]]) -> None:
        assert self.sync is not None
        this_step = self.attempted_steps + 1
        plan = sync_plan(self.config, this_step)
        from_gradient = self.config.basis_source == "gradient" and plan.refresh_basis
        own = self.sync.bases.each_replica_its_own
        may_be_first = self.sync.bases.may_be_first(this_step, self.executed_steps)
        ready = []
        for fragment, gradient, settings in chosen:
            if own and (from_gradient if fragment.has_basis else may_be_first):
                self.sync.bases.refresh_in_step(fragment, with_error(gradient, fragment.error), this_step)
            if not fragment.has_basis:
                if may_be_first and not own:
                    # A first basis comes from all replicas; nothing may cross them here, so the update waits.
                    fragment.gradient, fragment.settings = self._keep(fragment, gradient), settings
                else:
                    decay_(fragment.weight, settings)
                continue
            if from_gradient and not own:
                # A = G + E, before this step moves what it drops into E.
                kept = with_error(gradient, fragment.error)
                fragment.gradient = self._keep(fragment, kept) if kept is gradient else kept
            ready.append((fragment, gradient, settings))
        self._run_low_rank(ready, measure=plan.due)

    @staticmethod
    def _keep(fragment: Fragment, gradient: Tensor) -> Tensor:
        """A gradient that must outlive `step()`: engines reuse the flat buffers that hold several parameters."""
        return gradient if fragment.steps_whole_parameter else gradient.clone()

    def _run_low_rank(self, ready: list[tuple[Fragment, Tensor, StepSettings]], measure: bool) -> None:
        assert self.sync is not None
        bounds = bucket_bounds([fragment.plan.numel for fragment, _, _ in ready], STEP_BUCKET_NUMEL)
        for start, stop in bounds:
            fragments, gradients, settings = zip(*ready[start:stop], strict=True)
            for fragment in fragments:
                fragment.state["step"] += 1
            step_fragments_(fragments, gradients, settings, self.sync.inside, measure)

    # -- around an attempted step --------------------------------------------------------------------

    def begin_attempt(self) -> None:
        """Take over weights that were changed since the last step; an engine calls it before its own step.

        Raises:
            ConfigError: a parameter was resized or replaced.
        """
        assert self.sync is not None
        equal = self.attempted_steps == self.sync.last_synced_step
        self.sync.outside.check(self.attempted_steps + 1, equal)

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
            changed = self._cross_replicas()
        if self.synced:
            self.watchdog.synced(self.attempted_steps)
        self.last_attempt_executed, self._executed_now = self._executed_now, False
        if self.managed:
            self.sync.outside.forget()  # until the engine has given the model its weights, and records them
        else:
            self.sync.outside.record()
        return changed

    def _cross_replicas(self) -> bool:
        assert self.sync is not None
        changed = False
        plan = sync_plan(self.config, self.attempted_steps)
        if plan.due or self.executed_steps <= 1:
            self.sync.check_copies(self.attempted_steps)
        if self.sync.bases.wait_for_all_replicas(self.attempted_steps):
            executed_before = self.executed_steps - self._executed_now
            self.sync.bases.first(self.attempted_steps, executed_before, self._executed_now)
            changed = self._apply_deferred()
        if plan.due:
            self.executed_steps = self.sync.run(plan, self.attempted_steps, self.executed_steps, self._executed_now)
            changed = True
        return changed

    def _apply_deferred(self) -> bool:
        """The updates that waited for a basis; weight decay alone where there still is none."""
        assert self.sync is not None
        plan = sync_plan(self.config, self.attempted_steps)
        deferred = []
        for fragment in self.sync.items:
            if fragment.settings is None:
                continue
            assert fragment.gradient is not None
            deferred.append((fragment, fragment.gradient, fragment.settings))
            fragment.settings = None
            if not (fragment.has_basis and self.config.basis_source == "gradient" and plan.refresh_basis):
                fragment.gradient = None
        for fragment, _, settings in deferred:
            if not fragment.has_basis:
                decay_(fragment.weight, settings)
        self._run_low_rank([one for one in deferred if one[0].has_basis], measure=plan.due)
        return bool(deferred)

    @torch.no_grad()
    def final_sync(self) -> bool:
        """Sync now unless the last attempted step ended in one, and average the recorded rows. Collective.

        Returns:
            Whether weights changed.
        """
        if self.sync is None:
            raise ValueError("LoRDO: final_sync() comes after the first step: this optimizer has made none")
        self.begin_attempt()
        with self.watchdog.at_the_end_of(self.attempted_steps):
            if self.synced:
                self.sync.flush_rows()
                self.sync.outside.record()
                return False
            plan = final_plan(self.config, self.attempted_steps)
            self.executed_steps = self.sync.run(plan, self.attempted_steps, self.executed_steps, executed_now=False)
        self.watchdog.synced(self.attempted_steps)
        self.sync.outside.record()
        return True

    @property
    def synced(self) -> bool:
        """Whether the last attempted step ended in a sync."""
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
        saved = super().state_dict()
        saved["lordo"] = self.header().model_dump()
        return saved

    def header(self) -> Header:
        """What this rank's state is, and where it lies; the parameter groups must hold the stepped tensors."""
        sync = self.sync
        numbers = {tensor: i for i, tensor in enumerate(t for group in self.param_groups for t in group["params"])}
        inside = sync.inside if sync else InsideReplica()
        return Header(
            format=STATE_FORMAT,
            settings=self.config.model_dump(mode="json"),
            mesh=Mesh(
                replicas=sync.wire.replicas if sync else 1,
                replica=sync.wire.index if sync else 0,
                shards=inside.shard.size,
                shard=inside.shard.index,
                slices=inside.tensor.size,
                slice=inside.tensor.index,
                stages=self.pipe_stages,
                stage=self.pipe_stage,
            ),
            fragments=tuple(
                self._layout_of(fragment, numbers[tensor])
                for tensor, fragments in self._fragments.items()
                for fragment in fragments
            ),
            engine=self.engine_facts,
            counters=Counters(
                attempted_steps=self.attempted_steps,
                executed_steps=self.executed_steps,
                **{name: getattr(sync, name) if sync else 0 for name in SYNC_COUNTERS},
            ),
            bytes_sent=sync.wire.ledger.state_dict() if sync else {},
            rows=tuple(tuple(row) for row in sync.rows.pending) if sync else (),
        )

    def _layout_of(self, fragment: Fragment, tensor: int) -> FragmentLayout:
        plan, fact = fragment.plan, self._facts[fragment.plan.name]
        return FragmentLayout(
            name=plan.name,
            shape=plan.shape,
            partition_dim=fact.partition_dim,
            partitions=fact.partitions,
            partition_stride=fact.partition_stride,
            low_rank=plan.low_rank,
            side=plan.side,
            rank=plan.rank,
            interval=fragment.intervals[fragment.comm.index],
            tensor=tensor,
            offset=fragment.offset,
            copied=fragment.tied_copy,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state saved by `state_dict`; every tensor keeps its own dtype.

        Without an engine, each replica loads its own state and its own weights: between syncs they differ.

        Raises:
            CheckpointError: not a LoRDO state, another format, or one that does not fit this run; nothing is
                changed then.
        """
        ours = self.check_state_dict(state_dict)
        assert self.sync is not None
        if ours.fragments:  # a state saved before the first step has nothing but its settings
            for fragment, saved in self._with_saved(state_dict):
                _load_fragment(fragment, saved)
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved_group.items() if key != "params"})
        self.restore_counters(ours.counters, ours.bytes_sent, ours.rows)
        if not ours.fragments:
            self.sync.outside.record()

    def check_state_dict(self, state_dict: dict[str, Any]) -> Header:
        """The header of a state that can be loaded; the parameter groups must hold the stepped tensors.

        Raises:
            CheckpointError: it cannot; the message says what differs.
        """
        if self.sync is not None:
            ours = Header.of(state_dict, "this optimizer state")
            self._check_fits(ours, state_dict)
            return ours
        if self.managed:
            raise ValueError("LoRDO: load the state after deepspeed.initialize, through the engine")
        # Attaching is collective: all ranks resume, or none does.
        ours = agreed(lambda: Header.of(state_dict, "this optimizer state"))
        self._attach_alone(resuming=bool(ours.fragments))
        try:
            agreed(lambda: self._check_fits(ours, state_dict))
            self._check_finite(ours, state_dict)
        except CheckpointError:
            self._detach()
            raise
        return ours

    def _check_finite(self, ours: Header, state_dict: dict[str, Any]) -> None:
        assert self.sync is not None
        wire, found = self.sync.wire, []
        for fragment, saved in self._with_saved(state_dict) if ours.fragments else ():
            found += not_finite(wire.index, fragment.plan.name, {"weight": fragment.weight, **saved})
        reseeded = reseeded_later(found, wire.replicas, "the saved state")
        if reseeded and wire.index == 0:
            logger.warning("LoRDO: replicas %s were saved when not finite: the next sync reseeds them", reseeded)

    def _check_fits(self, ours: Header, state_dict: dict[str, Any]) -> None:
        names, saved_names = [plan.name for plan in self.plans], [fragment.name for fragment in ours.fragments]
        if saved_names and saved_names != names:
            odd = next((pair for pair in zip(saved_names, names, strict=False) if pair[0] != pair[1]), ("", ""))
            raise CheckpointError(
                f"LoRDO: the saved state holds {len(saved_names)} parameters, this model {len(names)}; "
                f"first difference: {odd[0]!r} against {odd[1]!r}"
            )
        refuse_differences(ours, self.header(), "the saved state", self.config.key(""), self.resume_hint)
        states, groups = state_dict.get("state"), state_dict.get("param_groups")
        if not (isinstance(states, dict) and isinstance(groups, list) and all(isinstance(one, dict) for one in groups)):
            raise CheckpointError("LoRDO: the saved state has no states, or no parameter groups: it is damaged")
        if len(groups) != len(self.param_groups):
            raise CheckpointError(
                f"LoRDO: the saved state has {len(groups)} parameter groups, this run {len(self.param_groups)}"
            )
        if saved_names:
            for fragment, saved in self._with_saved(state_dict):
                _check_saved(fragment, saved)

    def _with_saved(self, state_dict: dict[str, Any]) -> list[tuple[Fragment, dict[str, Any]]]:
        """Every fragment and what was saved of it."""
        # Indices count the tensors in the order of the groups, as torch's `state_dict` does.
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        return [
            (fragment, state_dict["state"].get(index, {}).get(fragment.plan.name, {}))
            for index, tensor in enumerate(tensors)
            for fragment in self._fragments.get(tensor, ())
        ]

    def restore_counters(
        self, counters: Counters, bytes_sent: Mapping[str, int], rows: Sequence[Sequence[float]]
    ) -> None:
        """Go on counting where a saved run was."""
        assert self.sync is not None
        self.attempted_steps, self.executed_steps = counters.attempted_steps, counters.executed_steps
        self.sync.bases.look_again()
        self.sync.faults.doubtful = False  # about steps that are undone
        self.sync.outside.forget()
        for name in SYNC_COUNTERS:
            setattr(self.sync, name, getattr(counters, name))
        self.sync.wire.ledger.load_state_dict(dict(bytes_sent))
        self.sync.rows.pending = [list(row) for row in rows]
        self.watchdog.resumed(self.attempted_steps, self.sync.last_synced_step)


def _check_saved(fragment: Fragment, saved: Any) -> None:
    """Refuse by name what is missing, surplus or of another kind, shape or dtype; nothing is changed before that."""
    name = fragment.plan.name
    if not isinstance(saved, dict):
        raise CheckpointError(f"LoRDO: the saved state of {name} is a {type(saved).__name__}: it is damaged")
    for key in sorted(fragment.state.keys() ^ saved.keys()):
        where = "no" if key in fragment.state else "a surplus"
        raise CheckpointError(
            f"LoRDO: the saved state of {name} has {where} {key!r}: was it saved with other settings?"
        )
    for key, current in fragment.state.items():
        value = saved[key]
        if isinstance(current, Tensor):
            wanted = f"{tuple(current.shape)} {current.dtype}"
            found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        else:
            wanted, found = type(current).__name__, type(value).__name__
        if found != wanted:
            raise CheckpointError(f"LoRDO: {key!r} of {name} is {found} in the saved state and {wanted} here")


def _load_fragment(fragment: Fragment, saved: dict[str, Any]) -> None:
    for key, current in fragment.state.items():
        if isinstance(current, Tensor):
            current.copy_(saved[key])
        else:
            fragment.state[key] = saved[key]
