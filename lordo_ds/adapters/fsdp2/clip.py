"""Clipping by the norm of one replica's gradients, whatever meshes its parameters are on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lordo_ds.core.local import is_distributed, local_part


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, also where some parameters are sliced by tensor parallelism and others not.

    torch's own refuses gradients of several meshes (2.13). Collective over the replica.

    Args:
        max_norm: of the 2-norm of all gradients of a replica together.

    Returns:
        That norm before it was clipped, (), equal on all ranks of the replica but for rounding.
    """
    of_mesh: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            of_mesh.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter.grad)
    norms = [_whole(torch.nn.utils.get_total_norm(gradients)) for gradients in of_mesh.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradients in of_mesh.values():
        torch._foreach_mul_([local_part(gradient) for gradient in gradients], factor)
    return norm


def _whole(norm: Any) -> Tensor:
    full: Tensor = norm.full_tensor() if is_distributed(norm) else norm
    return full
