"""`LoRDO`, a `torch.optim.Optimizer`: the inner step on the tensors it is given, and the sync when due."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lordo_ds.checkpoint.layout import (
    STATE_FORMAT,
    CheckpointError,
    Counters,
    EngineFacts,
    FragmentLayout,
    Header,
    Mesh,
    refuse_differences,
)
from lordo_ds.config import ConfigError, LordoConfig
from lordo_ds.core.fragments import FlatTensor, Piece, bucket_bounds, whole
from lordo_ds.core.grouping import ParameterFacts, ParameterPlan, plan_parameters
from lordo_ds.core.inner import StepSettings, adamw_step_, with_error
from lordo_ds.core.schedule import final_plan, steps_until_sync, sync_plan
from lordo_ds.dist.alike import require_alike, start_alone
from lordo_ds.dist.copies import TiedWeight
from lordo_ds.dist.fragment import Fragment
from lordo_ds.dist.groups import replica_groups
from lordo_ds.dist.inner_step import step_fragments_
from lordo_ds.dist.inside import InsideComm, InsideReplica
from lordo_ds.dist.nodes import layout_of_replicas
from lordo_ds.dist.report import SyncReport
from lordo_ds.dist.sync import OuterSync
from lordo_ds.dist.watchdog import Unwatched, watch_ranks
from lordo_ds.dist.wire import ReplicaWire

logger = logging.getLogger("lordo_ds")

SYNC_COUNTERS = ("syncs", "nonfinite_syncs", "left_out_syncs", "last_synced_step")
_GROUP_KEYS = ("lr", "betas", "eps", "weight_decay")
# Elements of matrices stepped together: bounds the coordinates that exist at one time.
STEP_BUCKET_NUMEL = 1 << 26


@dataclass(frozen=True)
class ModelSize:
    """Parameters of the whole model, of all stages and slices, every one counted once; and their elements."""

    low_rank_parameters: int = 0
    low_rank_elements: int = 0
    dense_parameters: int = 0
    dense_elements: int = 0


class LoRDO(torch.optim.Optimizer):
    """Low-rank Adam on every replica, averaged every `sync_interval` steps. LoRDO, arXiv 2602.04396.

    Used through DeepSpeed (`"optimizer": {"type": "LoRDO", "params": {...}}`), the engine's hook runs the
    sync at the end of each attempted step. Used alone, in one process or under `torch.distributed`,
    `step()` does it: every rank (or every `replica_size` ranks) is a replica, and no gradient is averaged
    by this class; ranks of one replica average theirs first, as with DistributedDataParallel over the
    replica's ranks.

    Args:
        params: parameters, parameter groups or named parameters; fp32 or fp64 (low-precision training keeps
            full-precision masters, as DeepSpeed's bf16 and fp16 modes do). 2-D tensors without a name are
            projected. Groups may set lr, betas, eps and weight_decay of their own.
        **settings: the keys of the JSON block, see `lordo_ds.LordoConfig`.

    Raises:
        ConfigError: an unknown or illegal key, named with its nearest legal value.
    """

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        self.config = LordoConfig.parse(settings)
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
        self.pipe_stage, self.pipe_stages = 0, 1
        self._facts: dict[str, ParameterFacts] = {}
        self._fragments: dict[Tensor, list[Fragment]] = {}
        self._tied: set[str] = set()
        self._executed_now = self.last_attempt_executed = False
        super().__init__(params, defaults)

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
        group_of = {tensor: group for group in self.param_groups for tensor in group["params"]}
        pieces = [(flat, piece) for flat in flats for piece in flat.pieces]
        facts = [piece.facts for _, piece in pieces]
        self.plans = plan_parameters(self.config, facts, inside.of_every_rank(facts))
        self._facts = {fact.name: fact for fact in facts}
        self._tied = {weight.name for weight in tied}
        tied_stages = {weight.name: weight.stage for weight in tied}
        precisions = {str(flat.tensor.dtype).removeprefix("torch.") for flat in flats}
        if len(precisions) > 1:
            raise ConfigError(f"LoRDO: parameters of several precisions, {sorted(precisions)}: give all in the same")
        fragments = []
        for (flat, piece), plan in zip(pieces, self.plans, strict=True):
            self._check_tensor(flat.tensor, plan)
            copied = tied_stages.get(plan.name, 0) > 0
            if plan.low_rank and plan.name in tied_stages:
                raise ConfigError(
                    f"LoRDO: {plan.name} is shared by several pipeline stages and cannot be projected: add it to "
                    "optimizer.params.low_rank.exclude"
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
        self.model_size = _model_size(fragments, inside)
        self.sync = OuterSync(self.config, fragments, wire, inside, tied)
        if not self.sync.start(resuming):
            logger.warning("LoRDO: the replicas started from different weights; all now have those of replica 0")
        ledgers = [comm.ledger for comm in (wire, inside.shard, inside.tensor, inside.everyone, inside.rows)]
        self.watchdog = watch_ranks(
            self.config.sync_timeout_s, lambda: sum(ledger.total_bytes for ledger in ledgers), owner=self
        )

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

    def _check_tensor(self, tensor: Tensor, plan: ParameterPlan) -> None:
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"LoRDO: {plan.name} is {tensor.dtype}: give fp32 or fp64 parameters, or train through "
                "DeepSpeed's bf16 or fp16 mode, which keeps fp32 masters"
            )
        if not tensor.is_contiguous():
            raise ConfigError(f"LoRDO: {plan.name} is not contiguous: make the parameter contiguous first")

    def _attach_alone(self, resuming: bool = False) -> None:
        """Without an engine: names from the groups where given, replicas from torch.distributed."""
        flats: list[FlatTensor] = []
        for group in self.param_groups:
            names = group.get("param_names")
            for index, parameter in enumerate(group["params"]):
                name, shape = names[index] if names else f"parameter_{len(flats)}", tuple(parameter.shape)
                flats.append(
                    FlatTensor(parameter, (Piece(ParameterFacts(name, shape, named=bool(names)), whole(shape)),))
                )
        wire, twins = ReplicaWire(), InsideComm()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            require_alike(start_alone(self.config, self.param_groups))
            groups = replica_groups(layout_of_replicas(range(dist.get_world_size()), self.config.replica_size))
            if groups.layout.replica_count > 1:
                twins = InsideComm(groups.shard)
                wire = ReplicaWire(groups.replica, twins)
        device = flats[0].tensor.device if flats else torch.device("cpu")
        self.attach(flats, wire, InsideReplica(everyone=twins, rows=twins, device=device), resuming=resuming)

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
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._step_tensor(tensor, group)
        self._executed_now = True
        if not self.managed:
            self.end_attempt()
        return loss

    def _step_tensor(self, tensor: Tensor, group: dict[str, Any]) -> None:
        """Step every fragment of one tensor; collective over the shard group where it is sharded."""
        assert self.sync is not None and tensor.grad is not None
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
        ready = []
        for fragment, gradient, settings in chosen:
            if self.sync.bases.each_replica_its_own and (not fragment.has_basis or from_gradient):
                self.sync.bases.refresh_in_step(fragment, with_error(gradient, fragment.error), this_step)
            if not fragment.has_basis:
                # A first basis comes from all replicas; nothing may cross them here, so the update waits.
                fragment.gradient, fragment.settings = self._keep(fragment, gradient), settings
                continue
            if from_gradient and not self.sync.bases.each_replica_its_own:
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

    # -- the end of an attempted step ----------------------------------------------------------------

    @torch.no_grad()
    def end_attempt(self) -> bool:
        """Count one attempted step and do what crosses replicas at its end. Collective; all replicas call it.

        Returns:
            Whether weights changed after `step()`: low-precision copies must then be refreshed.
        """
        assert self.sync is not None
        self.attempted_steps += 1
        self.executed_steps += self._executed_now
        with self.watchdog.at_the_end_of(self.attempted_steps):
            changed = self._cross_replicas()
        if self.synced:
            self.watchdog.synced(self.attempted_steps)
        self.last_attempt_executed, self._executed_now = self._executed_now, False
        return changed

    def _cross_replicas(self) -> bool:
        assert self.sync is not None
        changed = False
        plan = sync_plan(self.config, self.attempted_steps)
        if plan.due or self.executed_steps <= 1:
            self.sync.check_copies(self.attempted_steps)
        if self.sync.bases.wait_for_all_replicas() and self.sync.bases.first(self.attempted_steps):
            changed = self._apply_deferred()
        if plan.due:
            self.executed_steps = self.sync.run(plan, self.attempted_steps, self.executed_steps, self._executed_now)
            changed = True
        return changed

    def _apply_deferred(self) -> bool:
        assert self.sync is not None
        plan = sync_plan(self.config, self.attempted_steps)
        deferred = []
        for fragment in self.sync.items:
            if fragment.settings is None:
                continue
            assert fragment.gradient is not None
            deferred.append((fragment, fragment.gradient, fragment.settings))
            fragment.settings = None
            if not (self.config.basis_source == "gradient" and plan.refresh_basis):
                fragment.gradient = None
        self._run_low_rank(deferred, measure=plan.due)
        return bool(deferred)

    @torch.no_grad()
    def final_sync(self) -> bool:
        """Sync now unless the last attempted step ended in one, and average the recorded rows. Collective.

        Returns:
            Whether weights changed.
        """
        assert self.sync is not None, "final_sync() needs at least one step"
        with self.watchdog.at_the_end_of(self.attempted_steps):
            if self.synced:
                self.sync.flush_rows()
                return False
            plan = final_plan(self.config, self.attempted_steps)
            self.executed_steps = self.sync.run(plan, self.attempted_steps, self.executed_steps, executed_now=False)
        self.watchdog.synced(self.attempted_steps)
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

    def check_state_dict(self, state_dict: dict[str, Any]) -> Header:
        """The header of a state that can be loaded; the parameter groups must hold the stepped tensors.

        Raises:
            CheckpointError: it cannot; the message says what differs.
        """
        ours = Header.of(state_dict, "this optimizer state")
        if self.sync is not None:
            self._check_fits(ours, state_dict)
            return ours
        if self.managed:
            raise ValueError("LoRDO: load the state after deepspeed.initialize, through the engine")
        self._attach_alone(resuming=bool(ours.fragments))
        try:
            self._check_fits(ours, state_dict)
        except CheckpointError:
            self._detach()
            raise
        return ours

    def _check_fits(self, ours: Header, state_dict: dict[str, Any]) -> None:
        names, saved_names = [plan.name for plan in self.plans], [fragment.name for fragment in ours.fragments]
        if saved_names and saved_names != names:
            odd = next((pair for pair in zip(saved_names, names, strict=False) if pair[0] != pair[1]), ("", ""))
            raise CheckpointError(
                f"LoRDO: the saved state holds {len(saved_names)} parameters, this model {len(names)}; "
                f"first difference: {odd[0]!r} against {odd[1]!r}"
            )
        refuse_differences(ours, self.header(), "the saved state")
        if len(state_dict.get("param_groups", ())) != len(self.param_groups):
            raise CheckpointError(
                f"LoRDO: the saved state has {len(state_dict.get('param_groups', ()))} parameter groups, this run "
                f"{len(self.param_groups)}"
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
        for name in SYNC_COUNTERS:
            setattr(self.sync, name, getattr(counters, name))
        self.sync.wire.ledger.load_state_dict(dict(bytes_sent))
        self.sync.rows.pending = [list(row) for row in rows]


def _model_size(fragments: Sequence[Fragment], inside: InsideReplica) -> ModelSize:
    """Collective over the replica."""
    first_of_its_shards = inside.shard.index == inside.rows.index == 0
    counted = [fragment.plan for fragment in fragments if fragment.counts and first_of_its_shards]
    # A sliced parameter is one, its elements lie on all tensor indices.
    sizes = inside.of_every_rank([(p.low_rank, int(inside.tensor.index == 0), p.numel) for p in counted])
    low_rank, dense = ([size[1:] for size in sizes if size[0] == kind] for kind in (True, False))
    return ModelSize(
        sum(one for one, _ in low_rank),
        sum(numel for _, numel in low_rank),
        sum(one for one, _ in dense),
        sum(numel for _, numel in dense),
    )


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
