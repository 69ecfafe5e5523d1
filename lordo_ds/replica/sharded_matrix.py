"""A matrix whose elements lie on several ranks of a replica, as the refresh of a basis sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from lordo_ds.replica.fragment import Fragment


class ShardedMatrix:
    """A `LeftMatrix` whose elements lie on the shards and tensor slices like a fragment's; `shape` is its own part.

    No slice cuts the basis side, so products over l are summed, r columns at a time, and nothing else.
    """

    def __init__(self, fragment: Fragment, elements: Tensor) -> None:
        self.fragment, self.elements, self.slices = fragment, elements, fragment.slices
        self.shape = (fragment.plan.basis_side, fragment.plan.other_side)  # (s, l) of this tensor slice

    def like(self) -> Tensor:
        return self.elements

    def peak_and_norm(self) -> tuple[float, float]:
        peak = self.elements.new_zeros(1, dtype=torch.float64)
        if self.elements.numel():
            peak[0] = torch.linalg.vector_norm(self.elements, float("inf"))
        peak = torch.where(torch.isfinite(peak), peak, torch.full_like(peak, float("inf")))
        self.fragment.comm.max_(peak, "basis")
        self.slices.max_(peak, "basis")
        if not bool(torch.isfinite(peak[0])) or not bool(peak[0] > 0):
            return float(peak[0]), 0.0
        square = (self.elements / peak[0].to(self.elements.dtype)).square().sum(dtype=torch.float64).reshape(1)
        self.fragment.comm.sum_(square, "basis")
        return float(peak[0]), float(self.slices.sum_(square, "basis")[0]) ** 0.5

    def apply(self, columns: Tensor, scale: float) -> Tensor:
        comm, width = self.fragment.comm, columns.shape[1]  # columns: (s, width)
        middle = columns.new_zeros(self.shape[1], width)  # (l, width): this slice's part of l, all shards summed
        for tile in self.fragment.tiles:
            middle[tile.l_whole] += tile.view(self.elements).mT @ columns[tile.s_whole]
        middle = comm.sum_(middle, "basis").div_(scale)
        image = columns.new_zeros(self.shape[0], width)  # (s, width): summed over the shards, then over the slices
        for tile in self.fragment.tiles:
            image[tile.s_whole] += tile.view(self.elements) @ middle[tile.l_whole]
        return self.slices.sum_(comm.sum_(image, "basis"), "basis").div_(scale)

    def full(self, scale: float) -> Tensor:
        whole = self.fragment.whole_matrix(self.elements) / scale  # (s, l) of this slice
        # The slices lie along l, whose order the left space does not depend on.
        parts = self.slices.gather(whole.flatten(), "basis")  # (slices, s * l)
        # -> (slices, s, l) -> (s, slices, l) -> (s, slices * l)
        return parts.view(self.slices.size, *whole.shape).transpose(0, 1).reshape(whole.shape[0], -1)

    def agree(self, flag: bool) -> bool:
        answer = torch.tensor([int(flag)], device=self.elements.device)
        return bool(self.fragment.publish_(answer)[0])
