"""`LoRDO`, a `torch.optim.Optimizer`: the inner step on the tensors it is given, and the sync when due."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lordo_ds.config import ConfigError, LordoConfig
from lordo_ds.core.grouping import ParameterFacts, ParameterPlan, plan_parameters
from lordo_ds.core.inner import LowRankState, StepSettings, adamw_step_, low_rank_step_, with_error
from lordo_ds.core.mesh import replica_layout
from lordo_ds.core.schedule import final_plan, steps_until_sync, sync_plan
from lordo_ds.dist.groups import replica_groups
from lordo_ds.dist.sync import OuterSync, SyncItem, SyncReport
from lordo_ds.dist.wire import ReplicaWire

logger = logging.getLogger("lordo_ds")

STATE_FORMAT = 1
_GROUP_KEYS = ("lr", "betas", "eps", "weight_decay")
_ERROR_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
        self.plans: list[ParameterPlan] = []
        self._items: dict[Tensor, SyncItem] = {}
        self._executed_now = False
        super().__init__(params, defaults)

    # -- attaching to parameters and replicas --------------------------------------------------------

    def attach(self, facts: dict[Tensor, ParameterFacts], wire: ReplicaWire) -> None:
        """Plan every parameter and allocate its state. Collective over replicas: weights are made equal.

        Args:
            facts: name and role of each parameter in `param_groups`, keyed by the tensor that is stepped.
            wire: the replica group.
        """
        ordered = [(p, group) for group in self.param_groups for p in group["params"]]
        self.plans = plan_parameters(self.config, [facts[p] for p, _ in ordered])
        items = []
        for (parameter, group), plan in zip(ordered, self.plans, strict=True):
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f"LoRDO: {plan.name} is {parameter.dtype}: give fp32 or fp64 parameters, or train through "
                    "DeepSpeed's bf16 or fp16 mode, which keeps fp32 masters"
                )
            if plan.low_rank and plan.rank_clipped:
                logger.info("LoRDO: rank %s of %s is clipped to its smaller side, %d", self.config.rank, plan.name, plan.rank)
            item = SyncItem(plan, parameter.data, self.state[parameter], tuple(group["betas"]))
            item.state.update(self._new_state(parameter, plan))
            items.append(item)
            self._items[parameter] = item
        self.sync = OuterSync(self.config, items, wire)
        if not self.sync.start():
            logger.warning("LoRDO: the replicas started from different weights; all now have those of replica 0")

    def _new_state(self, parameter: Tensor, plan: ParameterPlan) -> dict[str, Any]:
        weight = parameter.detach()
        shape = (plan.rank, plan.other_side) if plan.low_rank else plan.shape
        state: dict[str, Any] = {"step": 0, "exp_avg": weight.new_zeros(shape), "exp_avg_sq": weight.new_zeros(shape)}
        if plan.low_rank:
            state["basis"] = weight.new_zeros(plan.basis_side, plan.rank)
            state["has_basis"] = False
            if self.config.error_feedback:
                dtype = weight.dtype if weight.dtype == torch.float64 else _ERROR_DTYPES[self.config.error_feedback]
                state["error"] = torch.zeros_like(weight, dtype=dtype)
            if self.config.qh_mode == "factored":
                state["row_mean_sq"] = weight.new_zeros(plan.basis_side)
                state["col_mean_sq"] = weight.new_zeros(plan.other_side)
        return state

    def _attach_alone(self) -> None:
        """Without an engine: names from the groups where given, replicas from torch.distributed."""
        facts: dict[Tensor, ParameterFacts] = {}
        for group in self.param_groups:
            names = group.get("param_names")
            for index, parameter in enumerate(group["params"]):
                name = names[index] if names else f"parameter_{len(facts)}"
                facts[parameter] = ParameterFacts(name, tuple(parameter.shape), named=bool(names))
        wire = ReplicaWire()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            world = dist.get_world_size()
            per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
            groups = replica_groups(replica_layout(range(world), self.config.replica_size, per_node))
            if groups.layout.replica_size not in (1, world):
                raise ConfigError(
                    f"LoRDO: replica_size = {groups.layout.replica_size} is not available in this version: "
                    'legal are 1 and "all" (nearest: 1)'
                )
            if groups.layout.replica_count > 1:
                wire = ReplicaWire(groups.replica)
        self.attach(facts, wire)

    # -- the inner step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One executed inner step; alone, also the sync if it is due."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.sync is None:
            if self.managed:
                return loss  # DeepSpeed's half-precision wrapper makes one empty call before attaching is possible
            self._attach_alone()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(self._items[parameter], parameter.grad, group)
        self.executed_steps += 1
        self._executed_now = True
        if not self.managed:
            self.end_attempt()
        return loss

    def _step_parameter(self, item: SyncItem, gradient: Tensor, group: dict[str, Any]) -> None:
        assert self.sync is not None
        settings = StepSettings(
            lr=float(group["lr"]),
            betas=item.betas,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            omega=self.config.omega,
            qh_mode=self.config.qh_mode,
            step=item.step + 1,
        )
        if not item.plan.low_rank:
            item.state["step"] += 1
            adamw_step_(item.weight, gradient, item.state["exp_avg"], item.state["exp_avg_sq"], settings)
            return
        this_step = self.attempted_steps + 1
        plan = sync_plan(self.config, this_step)
        from_gradient = self.config.basis_source == "gradient" and plan.refresh_basis
        if self.sync.own_basis and (item.basis is None or from_gradient):
            oriented = with_error(gradient, item.state.get("error"))
            self.sync.refresh_from(item, oriented, this_step)
        if item.basis is None:
            # A first basis comes from all replicas; nothing may cross them here, so the update waits.
            item.gradient, item.settings = gradient, settings
            return
        if from_gradient and not self.sync.own_basis:
            item.gradient = gradient
        self._low_rank_step(item, gradient, settings, measure=plan.due)

    def _low_rank_step(self, item: SyncItem, gradient: Tensor, settings: StepSettings, measure: bool) -> None:
        assert item.basis is not None
        item.state["step"] += 1
        orient, error = item.plan.orient, item.state.get("error")
        state = LowRankState(
            basis=item.basis,
            exp_avg=item.state["exp_avg"],
            exp_avg_sq=item.state["exp_avg_sq"],
            error=None if error is None else orient(error),
            row=item.state.get("row_mean_sq"),
            col=item.state.get("col_mean_sq"),
            measure=measure,
        )
        low_rank_step_(orient(item.weight), orient(gradient), state, settings)
        item.energies = state.energies

    # -- the end of an attempted step ----------------------------------------------------------------

    @torch.no_grad()
    def end_attempt(self) -> bool:
        """Count one attempted step and do what crosses replicas at its end. Collective; all replicas call it.

        Returns:
            Whether weights changed after `step()`: low-precision copies must then be refreshed.
        """
        assert self.sync is not None
        self.attempted_steps += 1
        changed = False
        if self.sync.waits_for_basis() and self.sync.first_basis(self.attempted_steps):
            changed = self._apply_deferred()
        plan = sync_plan(self.config, self.attempted_steps)
        if plan.due:
            self.executed_steps = self.sync.run(plan, self.attempted_steps, self.executed_steps, self._executed_now)
            changed = True
        self._executed_now = False
        return changed

    def _apply_deferred(self) -> bool:
        assert self.sync is not None
        changed = False
        plan = sync_plan(self.config, self.attempted_steps)
        for item in self.sync.items:
            if item.settings is None:
                continue
            gradient, settings = item.gradient, item.settings
            item.gradient = item.settings = None
            assert gradient is not None
            self._low_rank_step(item, gradient, settings, measure=plan.due)
            if self.config.basis_source == "gradient" and plan.refresh_basis:
                item.gradient = gradient
            changed = True
        return changed

    @torch.no_grad()
    def final_sync(self) -> bool:
        """Sync now unless the last attempted step ended in one, and average the recorded rows. Collective.

        Returns:
            Whether weights changed.
        """
        assert self.sync is not None, "final_sync() needs at least one step"
        if self.attempted_steps == 0 or sync_plan(self.config, self.attempted_steps).due:
            self.sync.flush_rows()
            return False
        plan = final_plan(self.config, self.attempted_steps)
        self.executed_steps = self.sync.run(plan, self.attempted_steps, self.executed_steps, executed_now=False)
        return True

    @property
    def synced(self) -> bool:
        """Whether the last attempted step ended in a sync."""
        return self.attempted_steps > 0 and sync_plan(self.config, self.attempted_steps).due

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
        saved["lordo"] = {
            "format": STATE_FORMAT,
            "settings": self.config.model_dump(mode="json"),
            "names": [plan.name for plan in self.plans],
            "attempted_steps": self.attempted_steps,
            "executed_steps": self.executed_steps,
            "syncs": self.sync.syncs if self.sync else 0,
            "nonfinite_syncs": self.sync.nonfinite_syncs if self.sync else 0,
            "bytes_sent": self.sync.wire.ledger.state_dict() if self.sync else {},
            "rows": [list(row) for row in self.sync.rows] if self.sync else [],
        }
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state saved by `state_dict`; every tensor keeps its own dtype.

        Raises:
            ValueError: not a LoRDO state, another format, or other parameters than these.
        """
        ours = state_dict.get("lordo")
        if not isinstance(ours, dict):
            raise ValueError("LoRDO: this optimizer state was not saved by LoRDO: start without it, or load the weights only")
        if ours["format"] != STATE_FORMAT:
            raise ValueError(f"LoRDO: optimizer state format {ours['format']} is not {STATE_FORMAT}: load it with the version that saved it")
        if self.sync is None:
            if self.managed:
                raise ValueError("LoRDO: load the state after deepspeed.initialize, through the engine")
            self._attach_alone()
        assert self.sync is not None
        names = [plan.name for plan in self.plans]
        if ours["names"] and ours["names"] != names:
            odd = next((pair for pair in zip(ours["names"], names, strict=False) if pair[0] != pair[1]), ("", ""))
            raise ValueError(
                f"LoRDO: the saved state holds {len(ours['names'])} parameters, this model {len(names)}; "
                f"first difference: {odd[0]!r} against {odd[1]!r}"
            )
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            self._load_item(self._items[parameter], state_dict["state"].get(index, {}))
        self.attempted_steps, self.executed_steps = ours["attempted_steps"], ours["executed_steps"]
        self.sync.syncs, self.sync.nonfinite_syncs = ours["syncs"], ours["nonfinite_syncs"]
        self.sync.wire.ledger.load_state_dict(ours["bytes_sent"])
        self.sync.rows = [list(row) for row in ours["rows"]]

    def _load_item(self, item: SyncItem, saved: dict[str, Any]) -> None:
        """Copy saved tensors into the allocated ones; what is missing or does not fit is refused by name."""
        for key, current in item.state.items():
            if key not in saved:
                raise ValueError(f"LoRDO: the saved state of {item.plan.name} has no {key!r}: was it saved with other settings?")
            value = saved[key]
            if not isinstance(current, Tensor):
                item.state[key] = value
            elif not isinstance(value, Tensor) or value.shape != current.shape or value.dtype != current.dtype:
                found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"LoRDO: {key!r} of {item.plan.name} is {found} in the saved state and "
                    f"{tuple(current.shape)} {current.dtype} here"
                )
            else:
                current.copy_(value)
