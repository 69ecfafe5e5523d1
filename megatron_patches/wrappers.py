"""Megatron's optimizer wrappers, with the sync at the end of every attempted step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain, zip_longest
from typing import Any

from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor

from lordo_ds.comm.agreement import agreed
from lordo_ds.errors import CheckpointError
from lordo_ds.optimizer import LoRDO
from megatron_patches.handle import TrainingHandle
from megatron_patches.samples import SampleCheck

logger = logging.getLogger("lordo_ds")


class EndsInASync:
    """Goes before one of Megatron's optimizer wrappers: every attempted step ends in the sync that is due.

    `handle` has what a training script reads: replicas, next sync, bytes sent, recorded rows.
    """

    handle: TrainingHandle
    steps_taken_over: int = 0
    """Executed steps that the last `step()`, or `handle.finish()`, took over from another replica, which the schedule
    has to make up for."""
    samples: SampleCheck
    check_loop: Callable[[], None]
    """Refuses a training loop whose gradients would not be the replica's own."""
    _in_step = False

    def step(self) -> Any:
        """Megatron's step, then the end of the attempt. Collective over all replicas where a sync is due.

        Returns:
            As Megatron's: (whether it was executed, gradient norm, zeros in the gradient).
        """
        self.check_loop()
        lordo: LoRDO = self.optimizer  # type: ignore[attr-defined]
        lordo.begin_attempt()
        self._in_step = True
        try:
            result = super().step()  # type: ignore[misc]
        finally:
            self._in_step = False
        before = lordo.executed_steps + bool(result[0])
        self.steps_taken_over = 0
        if lordo.end_attempt():
            self.take_over(lordo.executed_steps - before)
        assert lordo.sync is not None
        lordo.sync.outside.record()
        if lordo.synced and lordo.sync.syncs == 1:
            self.samples.compare(lordo.sync.wire)
        return result

    def step_with_ready_grads(self) -> bool:
        """As Megatron's, for `step()` alone: a ChainedOptimizer around this one would never sync."""
        if not self._in_step:
            raise RuntimeError(
                "LoRDO: call step() of the optimizer that lordo_optimizer() returned, not of a ChainedOptimizer "
                "around it: the replicas sync at the end of that call"
            )
        return bool(super().step_with_ready_grads())  # type: ignore[misc]

    def take_over(self, steps: int) -> None:
        """A sync gave this replica weights, and the count of one that had executed `steps` more."""
        self.steps_taken_over = steps
        self.refresh_model()
        self.optimizer.sync.outside.record()  # type: ignore[attr-defined]

    def refresh_model(self) -> None:
        """Copy the fp32 weights to the low-precision ones that the model computes with."""
        copy = getattr(self, "_copy_main_params_to_model_params", None)
        if copy is not None:
            copy()

    def reload_model_params(self, state_dict: Any = None) -> None:
        """The model was given other weights: take them over and anchor there. Collective over all replicas."""
        self.handle.drain(before_load=True)
        super().reload_model_params(state_dict=state_dict)  # type: ignore[misc]
        self.optimizer.sync.start(came_by="loaded")  # type: ignore[attr-defined]
        self.refresh_model()
        self.optimizer.sync.outside.record()  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` of the same rank gave; the weights of an fp32 model are loaded with the model.

        Collective over all ranks: all load, or none does.

        Raises:
            CheckpointError: it does not fit; nothing is changed then.
        """
        self.handle.drain(before_load=True)
        agreed(lambda: self._check_state(state_dict))
        groups = (state_dict if "param_groups" in state_dict else state_dict["optimizer"])["param_groups"]
        super().load_state_dict(_shallow(state_dict))  # type: ignore[misc]
        # Megatron matches groups by four keys, which groups with learning rates of their own have in common.
        for group, saved in zip(self.param_groups, groups, strict=True):  # type: ignore[attr-defined]
            group.update({key: value for key, value in saved.items() if key != "params"})

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        """Megatron copies its fp32 weights one by one, as far as there are any, and broadcasts."""
        self.optimizer.check_state_dict(  # type: ignore[attr-defined]
            state_dict if "param_groups" in state_dict else state_dict.get("optimizer")
        )
        live = getattr(self, "fp32_from_float16_groups", None)
        if live is None:
            return
        saved = state_dict.get("fp32_from_fp16_params", state_dict.get("fp32_from_fp16"))
        theirs, ours = ([[_kind(one) for one in group] for group in groups or ()] for groups in (saved, live))
        if theirs != ours:
            odd = next(
                (pair for pair in zip_longest(chain(*theirs), chain(*ours), fillvalue="none") if pair[0] != pair[1]),
                (f"{len(theirs)} groups", f"{len(ours)} groups"),
            )
            raise CheckpointError(f"LoRDO: an fp32 weight is {odd[0]} in the saved state and {odd[1]} in this run")

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "LoRDO: Megatron's sharded checkpoints hold one copy of what all data-parallel ranks share, and replicas "
            "differ between syncs: save state_dict() in one file per rank (torch.save), and load it on the same rank"
        )


class LordoFP32Optimizer(EndsInASync, FP32Optimizer):  # type: ignore[misc]  # Megatron has no types
    """Megatron's wrapper for fp32 parameters, with the sync."""


class LordoFloat16Optimizer(EndsInASync, Float16OptimizerWithFloat16Params):  # type: ignore[misc]  # the same
    """Megatron's wrapper for bf16 and fp16 parameters with fp32 copies, with the sync."""


def _kind(found: Any) -> str:
    return f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__


def _shallow(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy that survives Megatron's reordering of the groups."""
    copied = dict(state_dict)
    if "optimizer" in copied:
        copied["optimizer"] = _shallow(copied["optimizer"])
    if "param_groups" in copied:
        copied["param_groups"] = [dict(group) for group in copied["param_groups"]]
    return copied
