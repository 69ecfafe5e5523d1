"""Everything that is kept of a parameter, in one table: its name, its axes, and which running average it is.

The axes are those of the whole oriented parameter: s, l and r as in `lordo_ds.core`, e for its elements, o for those
that the replica owns (`lordo_ds.core.ownership`). What shards and tensor slices keep follows from them: a tensor with
an `l` is cut by columns, one with an `s` by rows of the basis, one of elements like the weight. Of dense parameters
every tensor has one value per element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Axis = Literal["e", "o", "s", "l", "r"]


@dataclass(frozen=True)
class Kept:
    """One tensor of a parameter's state.

    `beta` says which of the two betas a running average follows (None: it is none), and with it which of the two
    intervals of `moment_sync_interval` says when it is averaged over the replicas. `dense`: parameters that are not
    projected have it too; `required`: a saved state without it is damaged.
    """

    name: str
    axes: tuple[Axis, ...]
    beta: int | None = None
    dense: bool = False
    required: bool = False

    def dim(self, axis: Axis) -> int | None:
        """Which dimension that axis is; None: it has none."""
        return self.axes.index(axis) if axis in self.axes else None


# In the order in which they travel and are saved.
KEPT = (
    Kept("exp_avg", ("r", "l"), beta=0, dense=True, required=True),
    Kept("exp_avg_sq", ("r", "l"), beta=1, dense=True, required=True),
    Kept("row_mean_sq", ("s",), beta=1),
    Kept("col_mean_sq", ("l",), beta=1),
    Kept("basis", ("s", "r"), required=True),
    Kept("error", ("e",)),
    Kept("anchor", ("e",), dense=True),
    Kept("outer_momentum", ("e",), dense=True),
    Kept("owner_momentum", ("o",), dense=True),
    Kept("wire_error", ("e",), dense=True),
    Kept("owner_error", ("o",), dense=True),
)
# What an owner keeps for all replicas.
OWNED = tuple(kept.name for kept in KEPT if "o" in kept.axes)
# Of the outer optimizer: where every replica steps, and where the owners do.
MOMENTA = ("outer_momentum", "owner_momentum")
# What a lossy wire has not said yet: a run may start without it, or lay it down.
WIRE_ERRORS = ("wire_error", "owner_error")
# Placed where the setting `anchor` says: on the host of an accelerator, by default.
PLACED = ("anchor", *MOMENTA, *WIRE_ERRORS)
BY_NAME = {kept.name: kept for kept in KEPT}
# Running averages.
MOMENTS = tuple(kept for kept in KEPT if kept.beta is not None)
# What is no tensor: executed steps of the parameter, and whether its basis is there yet.
PLAIN_VALUES: dict[str, type] = {"step": int, "has_basis": bool}


def required(low_rank: bool) -> tuple[str, ...]:
    """Names without which a saved state is damaged."""
    tensors = [kept.name for kept in KEPT if kept.required and (low_rank or kept.dense)]
    return ("step", *tensors, "has_basis") if low_rank else ("step", *tensors)
