"""Running averages at a sync: a common step count, and averages over replicas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.inner import rescale_bias_correction
from lordo_ds.replica.fragment import Fragment
from lordo_ds.sync.rounds import Round

# Of one kind: (place of the parameter in the bucket, tensor, what a replica's own counts for in the average).
Averaged = list[tuple[int, Tensor, float]]


def common_steps_(bucket: Sequence[Fragment], steps: Tensor, who: Round) -> None:
    """Give all replicas the largest t; their moments keep their bias-corrected values, and those left out have none.

    Args:
        steps: (replicas, len(bucket)), every replica's t of each fragment.
    """
    for column, item in enumerate(bucket):
        common = int(steps[who.participants, column].max())
        for _, tensor, beta in item.moments():
            if who.takes_part:
                tensor.mul_(rescale_bias_correction(beta, item.step, common))
            else:
                tensor.zero_()
        item.state["step"] = common


def averaged_moments(
    bucket: Sequence[Fragment], steps: Tensor, who: Round, config: LordoConfig
) -> list[tuple[str, Averaged]]:
    """What this sync averages, after `common_steps_`: "exp_avg", and "exp_avg_sq", with which row and column means go.

    Replicas that never stepped a parameter contribute nothing to its averages.
    """
    due: tuple[Averaged, Averaged] = ([], [])
    for place, item in enumerate(bucket):
        counts = steps[who.participants, place]
        givers = int((counts > 0).sum()) or len(who.participants)
        for kept, tensor, _ in item.moments() if item.plan.low_rank or config.average_dense_moments else ():
            assert kept.beta is not None
            if who.plan.averages(kept.beta) and tensor.numel():
                due[kept.beta].append((place, tensor, 1.0 / givers))
    return [(kind, chosen) for kind, chosen in zip(("exp_avg", "exp_avg_sq"), due, strict=True) if chosen]


def average_moments_(
    bucket: Sequence[Fragment], steps: Tensor, who: Round, config: LordoConfig, wire: ReplicaWire
) -> None:
    """Average over the replicas what is due. Collective over them."""
    for kind, chosen in averaged_moments(bucket, steps, who, config) if wire.replicas > 1 else ():
        flat = torch.cat([tensor.flatten() * weight for _, tensor, weight in chosen])
        wire.sum_(flat, kind)
        for (_, tensor, _), part in zip(chosen, flat.split([t.numel() for _, t, _ in chosen]), strict=True):
            tensor.copy_(part.view_as(tensor))
