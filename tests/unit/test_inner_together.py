"""Matrices that take each operation together, as they do on a GPU, are stepped as each is alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.config import LordoConfig
from lordo_ds.core.fragments import whole
from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.core.inner import StepSettings
from lordo_ds.replica import inner_step
from lordo_ds.replica.fragment import Fragment

SHAPES = {"tall": (9, 6), "wide": (4, 7), "tall again": (9, 6), "square": (5, 5)}


def stepped(mode: str, feedback: Any) -> dict[str, dict[str, Tensor]]:
    """Weights and states after three steps; one matrix has a learning rate of its own."""
    fragments, weights, found = [], {}, {}
    config = LordoConfig.parse({"qh_mode": mode, "error_feedback": feedback})
    generator = torch.Generator().manual_seed(3)
    for name, shape in SHAPES.items():
        weights[name] = torch.randn(shape, generator=generator)
        side = "rows" if shape[0] < shape[1] else "columns"
        plan = ParameterPlan(name, shape, True, "", side=side, rank=2)
        fragment = Fragment(plan, weights[name], 0, whole(shape), InsideReplica(), {}, (0.9, 0.99))
        fragment.allocate(config)
        fragment.store_basis(torch.linalg.qr(torch.randn(plan.basis_side, 2, generator=generator)).Q)
        fragments.append(fragment)
    for step in (1, 2, 3):
        gradients = [torch.randn(9 * 6, generator=generator)[: fragment.numel] for fragment in fragments]
        one = StepSettings(0.1, (0.9, 0.99), 1e-6, 0.1, omega=0.4, qh_mode=mode, step=step, residual_weight=0.6)
        settings = [one, one, replace(one, lr=0.02), one]
        inner_step.step_fragments_(fragments, gradients, settings, InsideReplica(), measure=False)
    for fragment in fragments:
        tensors = {key: value for key, value in fragment.state.items() if isinstance(value, Tensor)}
        found[fragment.plan.name] = {"weight": weights[fragment.plan.name], **tensors}
    return found


@pytest.mark.parametrize("feedback", [False, "fp32"])
@pytest.mark.parametrize("mode", ["full_rank", "factored", "low_rank", "none"])
def test_stepped_together_equals_stepped_alone(mode: str, feedback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = stepped(mode, feedback)
    monkeypatch.setattr(inner_step, "_stepped_together", lambda works: [[3, 0, 1], [2]])
    together = stepped(mode, feedback)
    for name, tensors in alone.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, together[name][key]), f"{key} of {name}"
