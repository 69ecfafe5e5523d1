"""Parameters that several ranks of a replica hold whole and step alike: across tensor slices and pipeline stages.

Their gradients are equal, so their trajectories are; but averages over replicas add in another order in each replica
group, and last bits would drift apart. After a sync the first holder's values are everybody's. A gradient that is
*not* equal is partial: nothing has summed it. That is not repaired but refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lordo_ds.comm.checksum import checksum
from lordo_ds.comm.inside import InsideComm
from lordo_ds.core.state import MOMENTA, WIRE_ERRORS
from lordo_ds.errors import SyncError
from lordo_ds.replica.fragment import Fragment

# Equal gradients differ by rounding only; partial ones by parts of themselves.
_RELATIVE_TOLERANCE = 0.05
_CHUNK_NUMEL = 1 << 22


@dataclass(frozen=True)
class TiedWeight:
    """A weight of which several pipeline stages hold a copy.

    `comm` spans the ranks of all those stages, with this rank's tensor index, among which the copies are sharded;
    `stage` of `stages` is this rank's place among the stages. The first one's values count.
    """

    name: str
    comm: InsideComm
    stage: int
    stages: int


class TensorCopies:
    """What every tensor-parallel index keeps alike: parameters that are not sliced, row means of those that are."""

    def __init__(self, items: Sequence[Fragment], tensor: InsideComm) -> None:
        self.tensor = tensor
        self.items = list(items) if tensor.size > 1 else []

    def start_(self) -> bool:
        """Give all of them the first one's weights; whether they were equal before. Collective."""
        weights = [item.weight for item in self.items if item.duplicated]
        if not weights:
            return True
        mine = torch.tensor([checksum(weights)], dtype=torch.int64, device=weights[0].device)
        sums = self.tensor.gather(mine, "start")
        if bool((sums == sums[0]).all()):
            return True
        self._broadcast(weights)
        return False

    def republish_(self, bucket: Sequence[Fragment]) -> None:
        """Collective over the tensor group."""
        if self.tensor.size == 1:
            return
        tensors: list[Tensor] = []
        for item in bucket:
            if item.duplicated:
                tensors += [item.weight, *(tensor for _, tensor, _ in item.moments())]
                tensors += [item.state[name] for name in (*MOMENTA, *WIRE_ERRORS) if name in item.state]
            elif "row_mean_sq" in item.state:
                tensors.append(item.state["row_mean_sq"])
        self._broadcast(tensors)
        for item in bucket:
            if item.duplicated and "anchor" in item.state:
                item.state["anchor"].copy_(item.weight)

    def _broadcast(self, tensors: list[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for chosen in by_dtype.values():
            device = chosen[0].device
            flat = torch.cat([tensor.flatten().to(device) for tensor in chosen])
            self.tensor.broadcast_(flat, "copies")
            for tensor, part in zip(chosen, flat.split([t.numel() for t in chosen]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def check_gradients(self, step: int) -> None:
        """Refuse gradients that are not equal on all tensor indices. Collective over the tensor group.

        Raises:
            SyncError: naming the first such parameter.
        """
        chosen = [item for item in self.items if item.duplicated]
        if not chosen:
            return
        device = chosen[0].weight.device
        own = [item.waiting.take_gradient_square() for item in chosen]
        mine = torch.tensor(own, dtype=torch.float64, device=device)
        squares = self.tensor.gather(mine, "copies")
        for item, column in zip(chosen, squares.T, strict=True):
            if _differ(column, float(squares.max())):
                raise SyncError(
                    f"LoRDO: the gradient of {item.plan.name} differs between the tensor-parallel ranks at step {step} "
                    f"(squared norms {column.tolist()}): it is partial and nothing sums it; "
                    "call megatron_patches.sum_partial_gradients(model), or mark the parameter tensor_model_parallel "
                    "if each rank holds a slice of it"
                )


class TiedCopies:
    """Weights tied across pipeline stages, embedding and output head as a rule."""

    def __init__(self, items: Sequence[Fragment], tied: Sequence[TiedWeight]) -> None:
        by_name = {item.plan.name: item for item in items}
        self.pairs = [(by_name[weight.name], weight) for weight in tied]

    def republish_(self, moments: bool) -> None:
        """Give all stages the first one's weights, and moments where they were averaged. Collective."""
        for item, weight in self.pairs:
            names = [name for name in ("outer_momentum",) if name in item.state]
            names += [kept.name for kept, _, _ in item.moments()] if moments else []
            for tensor in [item.weight, *(item.state[name] for name in names)]:
                self._republish_tensor_(tensor, item, weight)
            if "anchor" in item.state:
                item.state["anchor"].copy_(item.weight)

    def _republish_tensor_(self, tensor: Tensor, item: Fragment, weight: TiedWeight) -> None:
        """The stages cut the weight in different places: whole chunks travel, filled by those who hold them."""
        start, stop = item.intervals[item.comm.index]
        for first in range(0, item.plan.numel, _CHUNK_NUMEL):
            last = min(first + _CHUNK_NUMEL, item.plan.numel)
            chunk = torch.zeros(last - first, dtype=tensor.dtype, device=item.weight.device)
            low, high = max(start, first), min(stop, last)
            if weight.stage == 0 and low < high:
                chunk[low - first : high - first] = tensor[low - start : high - start]
            weight.comm.sum_(chunk, "tied")
            if weight.stage > 0 and low < high:
                tensor[low - start : high - start] = chunk[low - first : high - first]

    def check_gradients(self, step: int) -> None:
        """Refuse gradients that are not equal on all stages. Collective over them.

        Raises:
            SyncError: naming the first such parameter.
        """
        for item, weight in self.pairs:
            squares = torch.zeros(weight.stages, dtype=torch.float64, device=item.weight.device)
            squares[weight.stage] = item.waiting.take_gradient_square()
            weight.comm.sum_(squares, "tied")
            if _differ(squares, float(squares.max())):
                raise SyncError(
                    f"LoRDO: the gradient of {item.plan.name} differs between the pipeline stages that share it at "
                    f"step {step} (squared norms {squares.tolist()}): nothing sums it over them"
                )


def _differ(squares: Tensor, largest: float) -> bool:
    if not bool(torch.isfinite(squares).all()):
        return False  # a replica that is not finite is left out of the sync, with its own message
    high, low = float(squares.max()), float(squares.min())
    return high - low > _RELATIVE_TOLERANCE * high and high > 1e-12 * largest
