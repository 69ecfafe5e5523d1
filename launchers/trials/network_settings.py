"""The settings that `bench_network.py` compares: a table of changes to the files in configs/ds/, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trials.machine import ROOT
from trials.pacer import Plan, Segment

_KEYS = {"name", "ds", "changes", "torchft", "settle_steps"}
_TORCHFT_KEYS = {"sync_interval", "fragments", "delay_steps", "quantize"}
# A method that averages at every step needs no more steps than this at a rate where each takes seconds.
_SLOW_MBIT_PER_S, _SLOW_STEPS = 50.0, 4


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    name: str
    period: int
    """Steps after which what crosses the link repeats: the interval between syncs, 1 where gradients are averaged."""
    deepspeed: Mapping[str, Any] | None = None
    """Its DeepSpeed JSON; None for torchft's own."""
    torchft: Mapping[str, Any] | None = None
    settle_steps: int = 0
    parts: int = 1
    """Fragments that are synced at steps of their own, each `delay_steps` before it is applied."""
    delay_steps: int = 0
    refusal: str = ""
    """What this version says of settings that it does not have."""

    def segment(self, mbit_per_s: float | None, periods: int, least_steps: int) -> Segment:
        """Whole periods at this rate, and at least so many steps (fewer where each one crosses a slow link)."""
        slow = mbit_per_s is not None and mbit_per_s < _SLOW_MBIT_PER_S
        least = min(least_steps, _SLOW_STEPS) if slow and self.period == 1 else least_steps
        steps = max(periods, -(-least // self.period)) * self.period
        return Segment(mbit_per_s, self.settle_steps + steps, self.settle_steps)

    def plan(self, rates: list[float | None], periods: int, least_steps: int) -> Plan:
        """The warm-up takes what only the first steps have, a first sync included."""
        segments = tuple(self.segment(rate, periods, least_steps) for rate in rates)
        return Plan(max(self.period, _SLOW_STEPS), segments)


def read_settings(path: Path) -> list[Setting]:
    """
    Raises:
        ValueError: the table is not as it should be; what a version of lordo_ds does not have is no such error.
    """
    import yaml

    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; see configs/network.yaml") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(table, list) or not all(isinstance(line, dict) for line in table):
        raise ValueError(f"{path}: must be a list of settings, as configs/network.yaml is")
    settings = [_setting(line, path) for line in table]
    names = [setting.name for setting in settings]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: {', '.join(map(repr, twice))} is there twice: give each setting a name of its own")
    return settings


def choose(settings: list[Setting], names: list[str] | None) -> list[Setting]:
    """Those named, in the table's order; all of them where none is named."""
    unknown = sorted(set(names or []) - {setting.name for setting in settings})
    if unknown:
        known = ", ".join(repr(setting.name) for setting in settings)
        raise ValueError(f"--settings {', '.join(map(repr, unknown))}: not in the table, which has {known}")
    return [setting for setting in settings if names is None or setting.name in names]


def _setting(line: dict[str, Any], path: Path) -> Setting:
    name = line.get("name")
    unknown = sorted(set(line) - _KEYS)
    if not isinstance(name, str) or unknown or ("ds" in line) == ("torchft" in line):
        raise ValueError(
            f"{path}: {line!r}: a setting has a `name` and either `ds` or `torchft`"
            + (f", and no {', '.join(unknown)}" if unknown else "")
        )
    settle_steps = line.get("settle_steps", 0)
    if "torchft" in line:
        options = line["torchft"] or {}
        if "changes" in line or not isinstance(options, dict) or set(options) - _TORCHFT_KEYS:
            raise ValueError(f"{path}: {name!r}: `torchft` has {', '.join(sorted(_TORCHFT_KEYS))}, and no `changes`")
        parts, delay_steps = options.get("fragments", 1), options.get("delay_steps", 0)
        return Setting(name, options.get("sync_interval", 32), None, options, settle_steps, parts, delay_steps)
    file = ROOT / "configs" / "ds" / f"{line['ds']}.json"
    if not file.exists():
        raise ValueError(f"{path}: {name!r}: there is no {file}")
    config = merged(json.loads(file.read_text(encoding="utf-8")), line.get("changes", {}))
    return _with_deepspeed(name, config, settle_steps)


def _with_deepspeed(name: str, config: dict[str, Any], settle_steps: int) -> Setting:
    from lordo_ds import ConfigError, LordoConfig

    optimizer = config["optimizer"]
    if optimizer["type"] != "LoRDO":
        return Setting(name, 1, config, settle_steps=settle_steps)
    try:
        lordo = LordoConfig.parse(optimizer["params"])
    except ConfigError as error:
        return Setting(name, 1, config, settle_steps=settle_steps, refusal=" ".join(str(error).split()))
    # One replica of all ranks averages gradients, and its syncs send nothing.
    period = 1 if lordo.replica_size == "all" else max(lordo.sync_interval, *lordo.moment_sync_intervals)
    streaming = lordo.streaming
    return Setting(name, period, config, None, settle_steps, streaming.fragments, streaming.delay_steps)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with these changes; objects are merged key by key, anything else is replaced."""
    found = dict(base)
    for key, value in changes.items():
        both = isinstance(found.get(key), Mapping) and isinstance(value, Mapping)
        found[key] = merged(found[key], value) if both else value
    return found
