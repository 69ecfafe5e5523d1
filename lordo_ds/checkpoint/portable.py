"""Portable checkpoints: whole parameters, whatever the layout that saved them or will load them.

A directory of

    manifest.json            format, parameters, settings, counters, plain values and the sums of all tensors
    shared.safetensors       tensors that are equal on all replicas, by "parameter:name"
    replica_<m>.safetensors  those that are not
    engine.pt                schedule, client state and parameter groups of each replica (tensors and plain values)
    complete.json            the sums of all files
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from lordo_ds.checkpoint.files import read_complete, read_json, read_saved
from lordo_ds.checkpoint.folders import recover_folder, whole_folder
from lordo_ds.checkpoint.header import (
    Counters,
    FragmentLayout,
    NonNegativeInt,
    PlainSettings,
    PositiveInt,
    Shape,
    check_format,
    first_fault,
)
from lordo_ds.checkpoint.pieces import Place, State, check_part
from lordo_ds.checkpoint.run import EngineState, SavedParameter, SavedRun
from lordo_ds.checkpoint.tensor_file import DTYPES, TensorFile, TensorWriter
from lordo_ds.core.state import KEPT
from lordo_ds.disk import write_text
from lordo_ds.errors import CheckpointError

PORTABLE_FORMAT, OLDEST_PORTABLE_FORMAT = 2, 1
MANIFEST = "manifest.json"
_SHARED = "shared.safetensors"
_ENGINE = "engine.pt"
_UNTRAINED = "untrained"
# Every name that a parameter's tensors may have.
_KEYS = ("weight", *(kept.name for kept in KEPT))


class _Parameter(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    shape: Shape
    low_rank: bool
    side: str
    rank: NonNegativeInt


class _Manifest(BaseModel):
    """`values` are what is no tensor, by parameter, for every replica; `shared` the keys of `shared.safetensors`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    saved_from: str
    mesh: str
    replicas: PositiveInt
    settings: PlainSettings
    parameters: list[_Parameter]
    values: dict[str, list[dict[str, NonNegativeInt | bool]]]
    counters: list[Counters]
    bytes_sent: list[dict[str, int]]
    rows: list[list[float]]
    untrained: list[str]
    sums: dict[str, dict[str, int]]


def is_portable(folder: Path) -> bool:
    """Whether a directory is, or was to be, a portable checkpoint."""
    recover_folder(folder)
    return (folder / MANIFEST).is_file()


class PortableRun(SavedRun):
    """A portable checkpoint, opened."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        read_complete(self.path)
        found = read_json(self.path / MANIFEST)
        check_format(found.get("format"), PORTABLE_FORMAT, str(self.path / MANIFEST), OLDEST_PORTABLE_FORMAT)
        try:
            self._manifest = _Manifest.model_validate(found)
        except ValidationError as error:
            raise CheckpointError(f"LoRDO: {self.path / MANIFEST} is damaged: {first_fault(error)}") from None
        self.replicas, self.settings = self._manifest.replicas, self._manifest.settings
        self.mesh = f"portable, from {self._manifest.mesh}"
        self.parameters = {
            one.name: SavedParameter(one.name, one.shape, one.low_rank, one.side, one.rank)
            for one in self._manifest.parameters
        }
        known = {_SHARED, *map(_file_of, range(min(self.replicas, len(self._manifest.counters))))}
        if not set(self._manifest.sums) <= known:
            raise CheckpointError(f"LoRDO: {self.path / MANIFEST} is damaged: its sums are of other files")
        self._files = {name: TensorFile(self.path / name) for name in self._manifest.sums}
        lengths = [len(self._manifest.counters), len(self._manifest.bytes_sent)]
        lengths += [len(one) for one in self._manifest.values.values()]
        if set(lengths) != {self.replicas} or set(self._manifest.values) != set(self.parameters):
            raise CheckpointError(f"LoRDO: {self.path / MANIFEST} is damaged: it does not list every replica's values")
        self._keys: dict[str, list[str]] = {}
        for file in self._files.values():
            for key in file.entries:
                owner, _, what = key.rpartition(":")
                if what not in self._keys.setdefault(owner, []):
                    self._keys[owner].append(what)

    def _read(self, key: str, replica: int) -> Tensor:
        for name in (_file_of(replica), _SHARED):
            if name in self._files and key in self._files[name].entries:
                if self._files[name].crc(key) != self._manifest.sums[name].get(key):
                    raise CheckpointError(f"LoRDO: {self.path / name}: {key} has changed since it was saved")
                return self._files[name].read(key)
        raise CheckpointError(f"LoRDO: {self.path} has no {key} of replica {replica}")

    def state(self, name: str, replica: int) -> State:
        if name not in self.parameters:
            raise CheckpointError(f"LoRDO: {self.path} holds no parameter {name}")
        keys = sorted(self._keys.get(name, []), key=lambda key: key != "weight")
        state: State = {key: self._read(f"{name}:{key}", replica) for key in keys}
        return {**state, **self._manifest.values[name][replica]}

    def check_state(self, name: str, replica: int) -> None:
        state, one = self.state(name, replica), self.parameters[name]
        numel = torch.Size(one.shape).numel()
        layout = FragmentLayout(
            name=name, shape=one.shape, partition_dim=None, partitions=1, partition_stride=1, low_rank=one.low_rank,
            side=one.side, rank=one.rank, interval=(0, numel), tensor=0, offset=0, owned=(0, numel),
        )  # fmt: skip
        weight = state.pop("weight", None)
        if not isinstance(weight, Tensor) or weight.shape != one.shape:
            raise CheckpointError(f"LoRDO: {self.path}: the weight of {name} is missing or damaged")
        check_part(state, Place(layout, ((0, numel),)), str(self.path))

    def counters(self, replica: int) -> Counters:
        return self._manifest.counters[replica]

    def bytes_sent(self, replica: int) -> dict[str, int]:
        return self._manifest.bytes_sent[replica]

    def rows(self) -> list[list[float]]:
        return self._manifest.rows

    def untrained(self, replica: int) -> dict[str, Tensor]:
        return {name: self._read(f"{_UNTRAINED}:{name}", replica) for name in self._manifest.untrained}

    def engine_state(self, replica: int) -> EngineState:
        found = read_saved(self.path / _ENGINE, classes={})
        try:
            return EngineState(**found[replica])
        except (TypeError, KeyError, IndexError):
            raise CheckpointError(f"LoRDO: {self.path / _ENGINE} is damaged") from None


def write_portable(run: SavedRun, folder: str | Path) -> None:
    """Write a run as a portable checkpoint; whole or not at all. One parameter is in memory at a time."""
    folder = Path(folder)
    with whole_folder(folder) as part:
        untrained = [run.untrained(m) for m in range(run.replicas)]
        writer = _Writer(part, run, untrained)
        values: dict[str, list[dict[str, int | bool]]] = {}
        with writer:
            for name in run.parameters:
                states = [run.state(name, m) for m in range(run.replicas)]
                values[name] = [{k: v for k, v in one.items() if not isinstance(v, Tensor)} for one in states]
                for key in [key for key, value in states[0].items() if isinstance(value, Tensor)]:
                    writer.add(f"{name}:{key}", [one[key] for one in states])
            for name in untrained[0]:
                writer.add(f"{_UNTRAINED}:{name}", [one[name] for one in untrained])
        states_of_engine = [run.engine_state(m).__dict__ for m in range(run.replicas)]
        torch.save(states_of_engine, part / _ENGINE)
        manifest = _Manifest(
            format=PORTABLE_FORMAT,
            saved_from=str(run.path),
            mesh=run.mesh,
            replicas=run.replicas,
            settings=run.settings,
            parameters=[_Parameter(**one.__dict__) for one in run.parameters.values()],
            values=values,
            counters=[run.counters(m) for m in range(run.replicas)],
            bytes_sent=[run.bytes_sent(m) for m in range(run.replicas)],
            rows=run.rows(),
            untrained=list(untrained[0]),
            sums=writer.sums,
        )
        write_text(part / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=1))


class _Writer:
    """One file for what the replicas share, and one for each of them, made when there is something to put in it."""

    def __init__(self, folder: Path, run: SavedRun, untrained: list[dict[str, Tensor]]) -> None:
        self.folder = folder
        self.sums: dict[str, dict[str, int]] = {}
        self._expected = [f"{_UNTRAINED}:{name}" for name in untrained[0]]
        self._expected += [f"{name}:{key}" for name in run.parameters for key in _KEYS]
        self._open: dict[str, TensorWriter] = {}

    def add(self, key: str, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.dtype not in DTYPES:
                raise CheckpointError(f"LoRDO: {key} is {tensor.dtype}, which a portable checkpoint cannot hold")
        if all(_same(tensors[0], other) for other in tensors[1:]):
            self._put(_SHARED, key, tensors[0])
            return
        for replica, tensor in enumerate(tensors):
            self._put(_file_of(replica), key, tensor)

    def _put(self, name: str, key: str, tensor: Tensor) -> None:
        if name not in self._open:
            self._open[name] = TensorWriter(self.folder / name, self._expected)
            self.sums[name] = {}
        self.sums[name][key] = self._open[name].add(key, tensor)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *raised: Any) -> None:
        for writer in self._open.values():
            writer.__exit__(*raised)


def _same(one: Tensor, other: Tensor) -> bool:
    """Bitwise, so that a NaN is equal to itself and -0 is not 0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def _file_of(replica: int) -> str:
    return f"replica_{replica}.safetensors"
