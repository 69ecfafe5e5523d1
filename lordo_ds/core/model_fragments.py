"""The fragments of a model that sync one after the other (`streaming`): whole layers, about equally large.

Streaming DiLoCo, arXiv 2501.18512. Plain names and integers, equal on all ranks of all replicas.
"""

from __future__ import annotations

from collections.abc import Iterable

from lordo_ds.config import LordoConfig
from lordo_ds.errors import ConfigError


def layer_of(name: str) -> str:
    """What a parameter's name says of its layer: up to the first number, else its module."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return name.rpartition(".")[0] or name


def model_fragments(config: LordoConfig, sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Which fragment each parameter is in: consecutive layers, the largest fragment as small as can be.

    Args:
        sizes: name and elements of every parameter of the model, in its order; of names that come again (copies on
            other pipeline stages) the first counts.

    Raises:
        ConfigError: the model has fewer layers than there are to be fragments.
    """
    first: dict[str, int] = {}
    layers: dict[str, list[str]] = {}
    for name, numel in sizes:
        if name not in first:
            first[name] = numel
            layers.setdefault(layer_of(name), []).append(name)
    fragments = config.streaming.fragments
    if fragments > len(layers):
        raise ConfigError(
            f"LoRDO: {config.key('streaming')}.fragments = {fragments} must be at most {len(layers)}, the layers of "
            f"this model: a fragment is whole layers (nearest: {len(layers)})"
        )
    runs = balanced_runs([sum(first[name] for name in names) for names in layers.values()], fragments)
    return {name: run for names, run in zip(layers.values(), runs, strict=True) for name in names}


def balanced_runs(sizes: list[int], count: int) -> list[int]:
    """Cuts a sequence into `count` runs, none empty, the largest as small as can be; the run of each element."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _runs(sizes, 1, middle)[-1] < count else (middle + 1, high)
    return _runs(sizes, count, low)


def _runs(sizes: list[int], least: int, capacity: int) -> list[int]:
    """Each run takes what fits into `capacity`, and leaves enough for `least` runs in all."""
    runs: list[int] = []
    run = filled = 0
    for place, size in enumerate(sizes):
        left = len(sizes) - place
        if place and (filled + size > capacity or left <= least - run - 1):
            run, filled = run + 1, 0
        filled += size
        runs.append(run)
    return runs
