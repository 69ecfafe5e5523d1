"""What one run is: everything that decides its numbers, and nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from lab.model import SIZES
from lordo_ds.config import LordoConfig
from lordo_ds.errors import ConfigError

_FORMAT = 1
"""Raise it when equal specs would give other numbers: earlier rows are then run anew."""


class SpecError(ValueError):
    """A grid or a row that describes no run; the message is one line for the user."""


@dataclass(frozen=True)
class RunSpec:
    """One run. `settings` is LoRDO's JSON block without lr; the other names are this harness's.

    replicas: data-parallel ranks M of the comparison. Every one is a replica, or, with `replica_size: "all"`, they are
        one replica together: the baselines that average gradients at every step.
    sequences: global batch, all ranks together.
    lr_warmup: steps of linear warm-up; a cosine to a tenth follows.
    slow: an outer optimizer around one replica, {"interval"} and keys of `outer`, for baselines whose basis changes at
        every step while the outer step is every `interval`; None for all others, whose own `outer` it is.
    validation: held-out sequences of the final evaluation.
    """

    method: str
    model: str
    replicas: int
    sequences: int
    steps: int
    lr: float
    seed: int
    lr_warmup: int = 0
    clip: float = 1.0
    validation: int = 1024
    slow: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model not in SIZES:
            raise SpecError(f"model = {self.model!r}: must be one of {', '.join(SIZES)}")
        if self.replicas < 1 or self.sequences % self.replicas:
            raise SpecError(f"sequences = {self.sequences} must be a multiple of replicas = {self.replicas}")
        if not 0 <= self.lr_warmup < self.steps:
            raise SpecError(f"lr_warmup = {self.lr_warmup} must be at least 0 and less than steps = {self.steps}")
        try:
            config = self.config
        except ConfigError as error:
            raise SpecError(f"method {self.method}: {error}") from None
        if self.slow and not (self.one_replica and config.outer.is_plain_average):
            raise SpecError(f"method {self.method}: slow is for one replica (replica_size: all) without an outer step")

    @cached_property
    def config(self) -> LordoConfig:
        return LordoConfig.parse({**self.settings, "lr": self.lr})

    @property
    def one_replica(self) -> bool:
        return self.config.replica_size == "all" or self.replicas == 1

    @property
    def id(self) -> str:
        """Equal for equal runs, however the settings are written; also with settings added to LoRDO later."""
        return _digest({**self._decisive, "lr": self.lr, "seed": self.seed})

    @property
    def cell(self) -> str:
        """The id without learning rate and seed: what one line of a table is about."""
        return _digest(self._decisive)

    @cached_property
    def _decisive(self) -> dict[str, Any]:
        spec = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("lr", "seed")}
        spec["settings"] = self.config.model_dump(mode="json", exclude_defaults=True, exclude={"lr", "preset"})
        return {**spec, "format": _FORMAT}

    def to_json(self) -> str:
        """All settings written out, defaults too: they may change."""
        full = self.config.model_dump(mode="json", exclude={"lr"})
        return json.dumps(asdict(replace(self, settings=full)), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> RunSpec:
        """
        Raises:
            SpecError: not what `to_json` writes.
        """
        try:
            return RunSpec(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise SpecError(f"not a run: {error}") from None


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]
