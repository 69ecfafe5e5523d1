"""A few elements of many tensors, compared bit by bit: cheap enough for every step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

SAMPLES = 256  # elements of a tensor, at most; evenly spaced
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Samples:
    """Copies of evenly spaced elements of tensors. Those of the same tensors can be compared.

    Args:
        tensors: (a number, the tensor, the columns of its matrix) of each.
    """

    def __init__(self, tensors: Iterable[tuple[int, Tensor, int]]) -> None:
        parts: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
        for number, tensor, columns in tensors:
            if tensor.numel():
                flat = tensor.detach().reshape(-1)[:: _distance(tensor.numel(), columns)]
                parts.setdefault((flat.dtype, flat.device), []).append((number, flat))
        self._numbers = {kind: [(number, len(flat)) for number, flat in found] for kind, found in parts.items()}
        self._values = {kind: torch.cat([flat for _, flat in found]) for kind, found in parts.items()}

    @property
    def on_host(self) -> bool:
        return all(device.type == "cpu" for _, device in self._values)

    @cached_property
    def _split(self) -> dict[int, Tensor]:
        return {
            number: part
            for kind, numbers in self._numbers.items()
            for (number, _), part in zip(
                numbers, self._values[kind].split([length for _, length in numbers]), strict=True
            )
        }

    def of(self, number: int) -> Tensor:
        """Those of one tensor; none where it has no elements here."""
        return self._split.get(number, torch.empty(0))

    def differs(self, other: Samples) -> Tensor:
        """Whether any bit differs, on the device that holds them."""
        flags = [(_bits(values) != _bits(other._values[kind])).any() for kind, values in self._values.items()]
        return torch.stack([flag.to(flags[0].device) for flag in flags]).any() if flags else torch.tensor(False)

    def changes(self, other: Samples) -> dict[int, float]:
        """The tensors of which any bit differs, and by how much, relative to the norm in `other`."""
        found = {}
        for kind, values in self._values.items():
            if torch.equal(_bits(values), _bits(other._values[kind])):
                continue
            for number, _ in self._numbers[kind]:
                now, before = self.of(number), other.of(number)
                if not torch.equal(_bits(now), _bits(before)):
                    apart, size = (now.double() - before.double()).norm(), before.double().norm()
                    found[number] = float(apart / size) if bool(size > 0) and bool(apart.isfinite()) else float("inf")
        return dict(sorted(found.items()))


def _distance(numel: int, columns: int) -> int:
    """Between two elements that are looked at. Whole rows, or about, would show few of the columns."""
    least = -(-numel // SAMPLES)
    return least | 1 if least < columns else -(-least // columns) * columns + int(0.618 * columns)


def _bits(values: Tensor) -> Tensor:
    """NaN is equal to itself."""
    return values.view(_INTEGERS[values.element_size()])
