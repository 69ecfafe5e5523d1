"""What `torch.amp.GradScaler` hands to an optimizer that takes part in loss scaling."""

from __future__ import annotations

import torch

from lordo_ds.core.local import local_part


def unscale_or_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Divide the gradients by the scale, in place, where that is still to be done; whether the step is to be executed.

    GradScaler does not call the `step()` of an ordinary optimizer when a gradient overflowed: the replica would not
    count the attempt, and the others would wait for it at the next sync. Of one that has `_step_supports_amp_scaling`
    it always calls it, and for the time of that call (torch 2.8 to 2.13) sets `found_inf`, above 0 after an overflow,
    and `grad_scale`, None where the user called `unscale_` already. Neither is there without a scaler, or with one
    that is not enabled.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None:
        return True
    if bool(found_inf):  # a host sync, which GradScaler itself makes for every other optimizer
        return False
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        inverse = scale.double().reciprocal().float()  # as GradScaler.unscale_ does, so that both ways agree bitwise
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = local_part(parameter.grad)
                    gradient.mul_(inverse.to(gradient.device))
    return True
