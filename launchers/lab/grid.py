"""A grid file: methods, claims and axes, expanded to runs in the order in which a budget should buy them.

    base:     what all runs share: keys of a run and, under `settings`, of LoRDO's JSON block
    lrs, seeds
    methods:  name -> {about, keys of a run, settings}
    claims:   name -> {title, methods: [...], axes: {key: [values]}, base, lrs, seeds, report}
    tiers:    name -> the same keys again, laid over the above for this tier

A cell is one method at one point of the axes; the values of an axis "+name" set several keys each. All cells of a
claim have the same grid of learning rates and the same search in it: with the first seed the three in the middle, then
on towards the better end until the best one has both its neighbours (or is the grid's last); the other seeds at that
rate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lab.results import Row
from lab.spec import RunSpec, SpecError

_RUN_KEYS = frozenset(f.name for f in fields(RunSpec)) - {"method", "lr", "seed", "settings"}
_FIRST_RATES = 3
_TOP = ("base", "lrs", "seeds", "methods", "claims", "about")
_CLAIM = ("title", "about", "methods", "axes", "base", "lrs", "seeds", "report")


@dataclass(frozen=True)
class Cell:
    """One line of a claim's table: a spec for each learning rate and seed."""

    claim: str
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    specs: dict[tuple[float, int], RunSpec]

    @property
    def key(self) -> str:
        return next(iter(self.specs.values())).cell


@dataclass(frozen=True)
class Grid:
    """All cells of all claims, in the file's order."""

    cells: tuple[Cell, ...]

    @property
    def claims(self) -> list[str]:
        return list(dict.fromkeys(cell.claim for cell in self.cells))

    def claims_of(self, key: str) -> str:
        """The claims that a cell belongs to, joined for the CSV."""
        return "+".join(dict.fromkeys(cell.claim for cell in self.cells if cell.key == key))

    def pending(self, rows: list[Row]) -> list[RunSpec]:
        """Runs that these rows lack, in the order of buying; later seeds only where the best rate is known.

        Breadth first: one learning rate (the middle one, then its neighbours) on all cells of all claims, claims in
        turn; then the second seed of all cells, then the third. A run that several claims share is bought once. Rates
        that the search may still want are not in it.
        """
        losses = {row["id"]: row["val_loss"] for row in rows}
        wanted: list[tuple[tuple[int, int, int], RunSpec]] = []
        turn: dict[str, int] = {}
        for cell in self.cells:
            position = turn[cell.claim] = turn.get(cell.claim, -1) + 1
            known = {lr: losses[run.id] for lr in cell.lrs if (run := cell.specs[lr, cell.seeds[0]]).id in losses}
            rates = rates_to_try(cell.lrs, known)
            for rank, lr in enumerate(rates):
                wanted.append(((len(known) + rank, position, len(wanted)), cell.specs[lr, cell.seeds[0]]))
            best = None if rates else best_lr(known)
            for rank, seed in enumerate(cell.seeds[1:] if best is not None else ()):
                wanted.append(((1000 + rank, position, len(wanted)), cell.specs[best, seed]))  # type: ignore[index]
        runs = {spec.id: spec for _, spec in sorted(wanted, key=lambda pair: pair[0])}
        return [spec for key, spec in runs.items() if key not in losses]

    def runs_in_all(self) -> int:
        """Runs of the whole grid, if no search leaves its middle; those that claims share count once."""
        seen: dict[str, int] = {}
        for cell in self.cells:
            seen[cell.key] = max(seen.get(cell.key, 0), min(len(cell.lrs), _FIRST_RATES) + len(cell.seeds) - 1)
        return sum(seen.values())


def best_lr(losses: dict[float, float]) -> float:
    """The learning rate with the lowest loss; the smallest of equals."""
    return min(losses, key=lambda lr: (losses[lr] if not math.isnan(losses[lr]) else math.inf, lr))


def rates_to_try(lrs: Sequence[float], known: dict[float, float]) -> list[float]:
    """The next learning rates of a search over the grid `lrs`; none where the best one is found.

    Args:
        known: the loss at each rate that was run.
    """
    first = [lr for lr in middle_out(lrs)[:_FIRST_RATES] if lr not in known]
    if first:
        return first
    ordered = sorted(lrs)
    best = ordered.index(best_lr(known))
    return [lr for lr in ordered[max(0, best - 1) : best + 2] if lr not in known]


def middle_out(values: Sequence[float]) -> list[float]:
    """The middle value first, then by distance from it."""
    ordered = sorted(values)
    middle = (len(ordered) - 1) / 2
    return [ordered[i] for i in sorted(range(len(ordered)), key=lambda i: (abs(i - middle), i))]


def load_grid(path: Path, tier: str | None, only: list[str] | None = None) -> Grid:
    """Expand a grid file.

    Args:
        tier: laid over the file; None where it has no tiers.
        only: claims to keep.

    Raises:
        SpecError: a key or value that describes no run.
    """
    return expand(load_document(path, tier), only, str(path))


def load_document(path: Path, tier: str | None) -> dict[str, Any]:
    """A grid file with one of its tiers laid over it.

    Raises:
        SpecError: not a grid file, or no such tier.
    """
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SpecError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or not {"methods", "claims"} <= set(document):
        raise SpecError(f"{path}: must hold methods and claims")
    tiers = document.pop("tiers", {})
    if tiers and tier not in tiers:
        raise SpecError(f"{path}: --tier must be one of {', '.join(tiers)}")
    return _laid_over(document, tiers.get(tier, {}))


def expand(merged: dict[str, Any], only: list[str] | None = None, where: str = "grid") -> Grid:
    """`load_grid` of a document in memory, its tier laid over it already."""
    _known(merged, _TOP, where)
    unknown = set(only or ()) - set(merged["claims"])
    if unknown:
        raise SpecError(f"{where}: no claim {sorted(unknown)[0]!r}: there are {', '.join(merged['claims'])}")
    cells = [cell for name, claim in merged["claims"].items() for cell in _cells(name, claim, merged, where)]
    return Grid(tuple(cell for cell in cells if not only or cell.claim in only))


def _laid_over(below: Any, above: Any) -> Any:
    """Mappings merge key by key, all else is replaced; `null` above removes."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    merged = {**below, **{key: _laid_over(below.get(key), value) for key, value in above.items()}}
    return {key: value for key, value in merged.items() if value is not None}


def _cells(name: str, claim: dict[str, Any], document: dict[str, Any], where: str) -> Iterator[Cell]:
    where = f"{where}: claim {name}"
    _known(claim, _CLAIM, where)
    base = _laid_over(document.get("base", {}), claim.get("base", {}))
    lrs = tuple(float(lr) for lr in claim.get("lrs", document["lrs"]))
    seeds = tuple(claim.get("seeds", document["seeds"]))
    axes = claim.get("axes", {})
    seen = set()
    for method in claim["methods"]:
        if method not in document["methods"]:
            raise SpecError(f"{where}: no method {method!r}: there are {', '.join(document['methods'])}")
        own = {key: value for key, value in document["methods"][method].items() if key != "about"}
        for values in itertools.product(*axes.values()):
            point: dict[str, Any] = {}
            for axis, value in zip(axes, values, strict=True):
                point |= value if axis.startswith("+") else {axis: value}
            keys = _laid_over(_laid_over(base, own), _split(point))
            _known(keys, (*_RUN_KEYS, "settings"), f"{where}: method {method}")
            try:
                specs = {(lr, s): RunSpec(method=method, lr=lr, seed=s, **keys) for lr in lrs for s in seeds}
            except (SpecError, TypeError) as error:
                raise SpecError(f"{where}: {error}") from None
            cell = Cell(name, lrs, seeds, specs)
            if cell.key not in seen:  # axes that a method does not have give the same run again
                seen.add(cell.key)
                yield cell


def _split(point: dict[str, Any]) -> dict[str, Any]:
    """Keys of a run as they are, all others as settings."""
    run = {key: value for key, value in point.items() if key in _RUN_KEYS}
    settings = {key: value for key, value in point.items() if key not in _RUN_KEYS}
    return {**run, "settings": settings}


def _known(keys: dict[str, Any], legal: tuple[str, ...], where: str) -> None:
    for key in keys:
        if key not in legal:
            raise SpecError(f"{where}: unknown key {key!r}: there are {', '.join(sorted(legal))}")
