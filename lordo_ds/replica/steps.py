"""The steps of one replica: which fragments of a tensor are stepped now, and which wait for the attempt's end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import bucket_bounds
from lordo_ds.core.inner import StepSettings, adamw_step_, decay_, with_error
from lordo_ds.core.schedule import Schedule
from lordo_ds.core.steppable import refuse_gradient
from lordo_ds.replica.allocate import Held
from lordo_ds.replica.bases import Bases
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.inner_step import step_fragments_

# Elements of matrices stepped together: bounds the coordinates that exist at one time.
STEP_BUCKET_NUMEL = 1 << 26

_Ready = tuple[Fragment, Tensor, StepSettings]


class Steps:
    """Steps what a rank holds of each tensor, together with the ranks that hold the rest.

    `schedule` has the plan of the attempt in hand, for all of its tensors and for its end.
    """

    def __init__(self, config: LordoConfig, held: Held, bases: Bases, inside: InsideReplica) -> None:
        self.config, self.held, self.bases, self.inside = config, held, bases, inside
        self.schedule = Schedule(config)

    def take(self, param_groups: Sequence[Mapping[str, Any]], step: int, executed_before: int) -> None:
        """Step every tensor that has a gradient. Collective over the shard group where tensors are sharded.

        Args:
            step: the attempted step, counted from 1.
            executed_before: steps that this replica has executed before this one.
        """
        for group in param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._take_tensor(tensor, group, step, executed_before)

    def _take_tensor(self, tensor: Tensor, group: Mapping[str, Any], step: int, executed_before: int) -> None:
        assert tensor.grad is not None
        fragments = self.held.of_tensor[tensor]
        refuse_gradient(fragments[0].plan.name, tensor, tensor.grad)
        low_rank = []
        compares = executed_before == 0 or self.schedule.plan(step).due
        for fragment in fragments:
            gradient = fragment.slice_of(tensor.grad)
            if compares and (fragment.duplicated or fragment.plan.name in self.held.tied):
                fragment.waiting.gradient_square = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
            settings = self._settings(fragment, group)
            if fragment.plan.low_rank:
                low_rank.append((fragment, gradient, settings))
            else:
                fragment.state["step"] += 1
                adamw_step_(
                    fragment.weight, gradient, fragment.state["exp_avg"], fragment.state["exp_avg_sq"], settings
                )
        self._take_low_rank(low_rank, step, executed_before)

    def _settings(self, fragment: Fragment, group: Mapping[str, Any]) -> StepSettings:
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

    def _take_low_rank(self, chosen: list[_Ready], step: int, executed_before: int) -> None:
        plan = self.schedule.plan(step)
        from_gradient = self.config.basis_source == "gradient" and plan.refresh_basis
        own = self.bases.each_replica_its_own
        without = any(not fragment.has_basis for fragment, _, _ in chosen)
        may_be_first = without and self.bases.may_be_first(step, executed_before)
        ready = []
        for fragment, gradient, settings in chosen:
            if own and (from_gradient if fragment.has_basis else may_be_first):
                self.bases.refresh_in_step(fragment, with_error(gradient, fragment.error), step)
            if not fragment.has_basis:
                if may_be_first and not own:
                    # A first basis comes from all replicas; nothing may cross them here, so the update waits.
                    fragment.waiting.defer(_kept(fragment, gradient), settings)
                else:
                    decay_(fragment.weight, settings)
                continue
            if from_gradient and not own:
                # A = G + E, before this step moves what it drops into E.
                used = with_error(gradient, fragment.error)
                fragment.waiting.gradient = _kept(fragment, used) if used is gradient else used
            ready.append((fragment, gradient, settings))
        self._run(ready, measure=plan.due)

    def take_deferred(self, step: int) -> bool:
        """The updates that waited for a basis; weight decay alone where there still is none.

        Returns:
            Whether there were any.
        """
        plan = self.schedule.plan(step)
        from_gradient = self.config.basis_source == "gradient" and plan.refresh_basis
        deferred: list[_Ready] = []
        for fragment in self.bases.items:
            update = fragment.waiting.take_update(keep_gradient=fragment.has_basis and from_gradient)
            if update is not None:
                deferred.append((fragment, *update))
        for fragment, _, settings in deferred:
            if not fragment.has_basis:
                decay_(fragment.weight, settings)
        self._run([one for one in deferred if one[0].has_basis], measure=plan.due)
        return bool(deferred)

    def _run(self, ready: list[_Ready], measure: bool) -> None:
        bounds = bucket_bounds([fragment.plan.numel for fragment, _, _ in ready], STEP_BUCKET_NUMEL)
        for start, stop in bounds:
            fragments, gradients, settings = zip(*ready[start:stop], strict=True)
            for fragment in fragments:
                fragment.state["step"] += 1
            step_fragments_(fragments, gradients, settings, self.inside, measure)


def _kept(fragment: Fragment, gradient: Tensor) -> Tensor:
    """A gradient that must outlive `step()`: engines reuse the flat buffers that hold several parameters."""
    return gradient if fragment.steps_whole_parameter else gradient.clone()
