"""All ranks are started alike, or none goes on: settings, parameters and versions, compared before any tensor travels.

A stale configuration on one node would train to the end without a word, or end in a hang. One exchange of digests
finds it; the texts themselves travel only where digests differ.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor

from lordo_ds.comm.groups import of_all_ranks
from lordo_ds.config import LordoConfig
from lordo_ds.errors import ConfigError
from lordo_ds.replica.fragment import Fragment
from lordo_ds.version import __version__

logger = logging.getLogger("lordo_ds")

# Of our settings (or blocks of them), what each machine may have of its own: none changes what crosses replicas.
MAY_DIFFER = ("anchor.device", "sync_timeout_s", "wire_throttle")
_TAG = "lordo_ds start 1"
_NAMED = 3  # differences that a message names
Texts = dict[str, str]


@dataclass(frozen=True)
class Start:
    """What one rank was started with: texts by key.

    Attributes:
        everywhere: equal on all ranks.
        here: equal on all ranks of the same `place` (pipeline stage and tensor index): parameters and their groups.
        warned: a difference is said, and no more.
        refusal: why this rank cannot start; the others must not wait for it.
    """

    everywhere: Texts = field(default_factory=dict)
    here: Texts = field(default_factory=dict)
    warned: Texts = field(default_factory=dict)
    place: str = ""
    refusal: str = ""

    def digests(self) -> tuple[str, ...]:
        sums = [hashlib.sha256(repr(list(one.items())).encode()).hexdigest() for one in self._texts()]
        return (_TAG, self.place, self.refusal, *sums)

    def texts(self) -> tuple[Any, ...]:
        return (_TAG, self.place, self.refusal, *self._texts())

    def _texts(self) -> tuple[Texts, Texts, Texts]:
        return self.everywhere, self.here, self.warned


def require_alike(start: Start, of_all: Callable[[Any], Sequence[Any]] = of_all_ranks) -> None:
    """Refuse to start where ranks were started differently. Collective over all ranks.

    Args:
        of_all: every rank's value, in the order of ranks.

    Raises:
        ConfigError: on all ranks at once and with the same words: the key, the values and the ranks; or why one cannot.
    """
    digests = _of_this_version(of_all(start.digests()))
    refusals = [one[2] for one in digests]
    if any(refusals):
        first = next(filter(None, refusals))
        ranks = [rank for rank, one in enumerate(refusals) if one == first]
        raise ConfigError(first if len(ranks) == len(refusals) else f"{first} (so on {_ranks(ranks)} only)")
    places = [one[1] for one in digests]
    everywhere, here, warned = ([one[3 + i] for one in digests] for i in range(3))
    by_place = set(zip(places, here, strict=True))
    if len(set(everywhere)) == len(set(warned)) == 1 and len(by_place) == len(set(places)):
        return
    texts = _of_this_version(of_all(start.texts()))
    found = list(_differences([one[3] for one in texts]))
    for place in sorted(set(places)):
        found += _differences([one[4] if one[1] == place else None for one in texts])
    if found:
        more = f"; {len(found)} differences in all" if len(found) > _NAMED else ""
        raise ConfigError(
            f"LoRDO: the ranks were started differently: {'; '.join(found[:_NAMED])}{more}: give all of them the same "
            "configuration, program and packages"
        )
    if dist.get_rank() == 0:
        for line in _differences([one[5] for one in texts]):
            logger.warning("LoRDO: %s: replicas that round differently are stopped by the checksum of a sync", line)


def require_like(theirs: Any, ours: Start) -> None:
    """Refuse to join others that were started differently.

    Args:
        theirs: the `texts()` of one of them, as they came.

    Raises:
        ConfigError: the key and both values.
    """
    texts = _of_this_version([ours.texts(), theirs])
    found = list(_differences([one[3] for one in texts], ("here", "there")))
    found += _differences([one[4] for one in texts], ("here", "there"))
    if found:
        raise ConfigError(
            f"LoRDO: this replica was started differently from the one that it takes over from: "
            f"{'; '.join(found[:_NAMED])}: give it the same configuration, program and packages"
        )


def _of_this_version(values: Sequence[Any]) -> Sequence[tuple[Any, ...]]:
    """Another program would send something else at this point."""
    odd = [rank for rank, one in enumerate(values) if not (isinstance(one, tuple) and one[:1] == (_TAG,))]
    if odd:
        raise ConfigError(f"LoRDO: {_ranks(odd)} run another version of lordo_ds: install the same on all ranks")
    return values


def _differences(texts: Sequence[Mapping[str, str] | None], places: Sequence[str] = ()) -> Iterator[str]:
    """In words, what is not the same on all ranks that have texts, in the order of the keys."""
    keys = dict.fromkeys(key for one in texts if one is not None for key in one)
    for key in keys:
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(texts):
            if one is not None:
                ranks.setdefault(one.get(key, "nothing"), []).append(rank)
        if len(ranks) > 1:
            where = [places[at[0]] if places else f"on {_ranks(at)}" for at in ranks.values()]
            yield f"{key} is " + " and ".join(f"{value} {at}" for value, at in zip(ranks, where, strict=True))


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


# -- what is compared --------------------------------------------------------------------------------


def setting_texts(config: LordoConfig) -> Texts:
    """All of LoRDO's settings as they are resolved, but `MAY_DIFFER`."""
    found = flat_texts("", config.model_dump(mode="json"))
    return {config.key(key): text for key, text in found.items() if not _may_differ(key)}


def _may_differ(key: str) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in MAY_DIFFER)


def version_texts(*more_packages: str) -> Texts:
    """Versions that must be equal.

    Other kernels round differently, which the checksum of the first sync would refuse in vaguer words; other versions
    of DeepSpeed scale and clip gradients differently.
    """
    versions = {"lordo_ds": __version__, "torch": torch.__version__}
    versions |= {package: importlib.metadata.version(package) for package in more_packages}
    found = {f"the version of {package}": str(version) for package, version in versions.items()}
    return found | {"torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision()}


def machine_texts(device: torch.device | None = None) -> Texts:
    """What may work when it differs, and is worth a warning."""
    if device is not None and device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"the version of Python": f"{sys.version_info.major}.{sys.version_info.minor}", "the hardware": hardware}


def parameter_texts(groups: Iterable[Mapping[str, Any]], names: Mapping[int, str]) -> Texts:
    """Groups with their options; names, shapes and dtypes of their parameters, in order.

    Args:
        groups: as torch's `param_groups`.
        names: of parameters, by `id`.
    """
    found: Texts = {}
    for number, group in enumerate(groups):
        for key, value in group.items():
            if key not in ("params", "param_names"):
                found |= flat_texts(f"{key} of parameter group {number}", value)
        for place, parameter in enumerate(group["params"]):
            found[f"parameter {place} of group {number}"] = tensor_text(names.get(id(parameter), "?"), parameter)
    return found


def start_of_replica(config: LordoConfig, items: Sequence[Fragment], more: Texts) -> Start:
    """Of a job that is one replica, by the parameters that it steps.

    Args:
        more: what else must be equal.
    """
    held = {
        f"parameter {place}": f"{item.plan.name} {item.plan.shape} {str(item.weight.dtype).removeprefix('torch.')}"
        for place, item in enumerate(items)
    }
    return Start(everywhere=version_texts() | setting_texts(config) | more, here=held)


def start_alone(config: LordoConfig, groups: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> Start:
    """Of an optimizer without an engine, every rank of which holds whole parameters; `names` by their `id`."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return Start(
        everywhere=version_texts() | setting_texts(config),
        here=parameter_texts(groups, names),
        warned=machine_texts(parameters[0].device if parameters else None),
    )


def tensor_text(name: str, tensor: Tensor) -> str:
    shape = tuple(getattr(tensor, "ds_shape", tensor.shape))  # DeepSpeed's ZeRO 3 leaves an empty tensor
    frozen = ", frozen" if isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad else ""
    return f"{name} {shape} {str(tensor.dtype).removeprefix('torch.')}{frozen}"


def flat_texts(prefix: str, value: Any) -> Texts:
    """Plain values inside mappings, models and plain objects, by dotted keys; of anything else its kind."""
    if isinstance(value, BaseModel):
        value = {key: getattr(value, key) for key in type(value).model_fields}
    if isinstance(value, Mapping):
        nested = [flat_texts(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items()]
        return {key: text for one in nested for key, text in one.items()}
    return {prefix: _text(value)}


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return _text(value.value)
    if isinstance(value, Tensor):
        return _text(value.tolist()) if value.numel() == 1 else f"a tensor {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))
