"""A step that only makes state: what `torch.distributed.checkpoint.state_dict` calls before the first real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire


def only_makes_state(groups: Sequence[Mapping[str, Any]], wire: ReplicaWire, inside: InsideReplica) -> bool:
    """Whether a first step would do nothing on any rank: every lr is 0, and every gradient is exactly zero.

    torch's `get_optimizer_state_dict` and `set_optimizer_state_dict` make one where the state is empty
    (`_init_optim_state`, torch 2.13). Such a step is none: it counts nothing, and fixes no basis.

    Collective over all ranks where every lr is 0, as in the first step of a warm-up: what is no step for one replica
    must be none for the others.
    """
    if any(float(group["lr"]) for group in groups):
        return False
    gradients = [tensor.grad for group in groups for tensor in group["params"] if tensor.grad is not None]
    moves = inside.any_rank(any(bool(gradient.any()) for gradient in gradients))
    return not bool(wire.gather(inside.vector([int(moves)]), "start").any())
