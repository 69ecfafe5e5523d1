"""State that several shards of a replica keep, made equal again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lordo_ds.comm.inside import InsideComm
from lordo_ds.replica.fragment import Fragment


def republish_(bucket: Sequence[Fragment], shard: InsideComm) -> None:
    """Give state that several shards keep the value of its first holder on all of them. Collective over shards.

    Averages in several groups add in different orders, and products of different widths round differently: the
    copies would drift apart in the last bit.
    """
    copies = [copy for item in bucket if item.shards is not None for copy in _copies(item)] if shard.size > 1 else []
    if not copies:
        return
    buffer = copies[0].values.new_zeros(sum(copy.size for copy in copies))
    parts = buffer.split([copy.size for copy in copies])
    for copy, part in zip(copies, parts, strict=True):
        part.view(copy.count, -1)[copy.index[copy.mine]] = copy.values[copy.local[copy.mine]]
    shard.sum_(buffer, "border")
    for copy, part in zip(copies, parts, strict=True):
        copy.values[copy.local] = part.view(copy.count, -1)[copy.index]


@dataclass(eq=False)
class _Copy:
    """Rows of a state that several shards keep: `values[local]` are rows `index` of `count`; `mine` publishes them."""

    values: Tensor
    count: int
    index: Tensor
    local: Tensor
    mine: Tensor

    @property
    def size(self) -> int:
        return self.count * self.values.shape[1]


def _copies(item: Fragment) -> Iterator[_Copy]:
    """What several shards keep of one matrix: border rows, and the row means of a basis on columns."""
    assert item.shards is not None
    index, local = item.border_places
    first = item.shards.rows(item.comm.index)[0]
    owned_first, owned_last = item.shards.owned_rows(item.comm.index)
    mine = (local + first >= owned_first) & (local + first < owned_last)
    names = ("row_mean_sq",) if item.shards.basis_on_rows else ("exp_avg", "exp_avg_sq", "col_mean_sq")
    for name in names if item.border_rows else ():
        if name in item.state:
            values = item.state[name].mT if item.state[name].dim() == 2 else item.state[name].unsqueeze(1)
            yield _Copy(values, len(item.border_rows), index, local, mine)
    if not item.shards.basis_on_rows and "row_mean_sq" in item.state:
        holder = next(i for i, (start, stop) in enumerate(item.intervals) if stop > start)
        all_rows = torch.arange(len(item.state["row_mean_sq"]), device=index.device)
        publishes = torch.full_like(all_rows, holder == item.comm.index, dtype=torch.bool)
        yield _Copy(item.state["row_mean_sq"].unsqueeze(1), item.plan.basis_side, all_rows, all_rows, publishes)
