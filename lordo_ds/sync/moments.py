"""Running averages at a sync: a common step count, and averages over replicas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.inner import rescale_bias_correction
from lordo_ds.core.schedule import SyncPlan
from lordo_ds.replica.fragment import Fragment


def common_moments_(
    bucket: Sequence[Fragment],
    steps: Tensor,
    participants: list[int],
    takes_part: bool,
    plan: SyncPlan,
    config: LordoConfig,
    wire: ReplicaWire,
) -> None:
    """Give all replicas the largest t; moments are averaged where due, else keep their bias-corrected value.

    Averages are of bias-corrected moments, rescaled with the common t; replicas that never stepped a parameter
    contribute nothing to its averages. Collective over replicas.

    Args:
        steps: (replicas, len(bucket)), every replica's t of each fragment.
        takes_part: whether this replica is among the participants; otherwise its moments count as zero.
    """
    # By which beta they follow: row and column means go with exp_avg_sq.
    due: tuple[list[tuple[Tensor, float]], list[tuple[Tensor, float]]] = ([], [])
    for column, item in enumerate(bucket):
        counts = steps[participants, column]
        common = int(counts.max())
        givers = int((counts > 0).sum()) if common else len(participants)
        shared = item.plan.low_rank or config.average_dense_moments
        for kept, tensor, beta in item.moments():
            if takes_part:
                tensor.mul_(rescale_bias_correction(beta, item.step, common))
            else:
                tensor.zero_()
            assert kept.beta is not None
            if plan.averages(kept.beta) and shared and tensor.numel():
                due[kept.beta].append((tensor, 1.0 / givers))
        item.state["step"] = common
    for kind, chosen in zip(("exp_avg", "exp_avg_sq"), due, strict=True) if wire.replicas > 1 else ():
        if chosen:
            flat = torch.cat([tensor.flatten() * weight for tensor, weight in chosen])
            wire.sum_(flat, kind)
            for (tensor, _), part in zip(chosen, flat.split([t.numel() for t, _ in chosen]), strict=True):
                tensor.copy_(part.view_as(tensor))
