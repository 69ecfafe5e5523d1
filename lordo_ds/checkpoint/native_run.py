"""A run as its engines saved it, in the files that DeepSpeed writes for each replica: whole parameters out of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lordo_ds.checkpoint.bounds import check_cover, check_header
from lordo_ds.checkpoint.deepspeed_files import SavedPart, checked_dict, model_file, optimizer_files, read_part
from lordo_ds.checkpoint.files import read_complete, read_saved
from lordo_ds.checkpoint.header import Counters, FragmentLayout, Untrained
from lordo_ds.checkpoint.pieces import Place, State, check_part, check_plain, join
from lordo_ds.checkpoint.replica_folders import replica_folders, tag_folder
from lordo_ds.checkpoint.run import EngineState, SavedParameter, SavedRun, mean_rows
from lordo_ds.core.slices import join_slices
from lordo_ds.core.state import PLAIN_VALUES
from lordo_ds.errors import CheckpointError

# Entries of a model's file that DeepSpeed makes; the others are its user's.
_ENGINE_KEYS = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
}  # fmt: skip


class _Replica:
    """All files of one replica. The model's files are by (stage, slice); at stage 3 those of the first shard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        parts = [read_part(path) for path in optimizer_files(folder)]
        if not parts:
            raise CheckpointError(f"LoRDO: {folder} holds no state of a LoRDO optimizer")
        self.parts = {part.header.mesh.inside: part for part in parts}
        mesh = parts[0].header.mesh
        ranks = mesh.stages * mesh.slices * mesh.shards
        wanted = (  # one at a time, and no more than there are files: a forger's mesh has millions
            (stage, index, shard)
            for stage in range(mesh.stages)
            for index in range(mesh.slices)
            for shard in range(mesh.shards)
        )
        missing = next((place for place in islice(wanted, len(parts) + 1) if place not in self.parts), None)
        if missing is not None or len(parts) != ranks:
            raise CheckpointError(
                f"LoRDO: {folder} holds the states of {len(parts)} ranks, not of {ranks}"
                + (f"; (stage, tensor rank, shard) {missing} is missing" if missing else "")
            )
        for part in parts:
            if part.header.mesh.model_copy(update=mesh.place) != mesh:
                raise CheckpointError(f"LoRDO: {part.path}: another mesh than that of the other ranks: it is damaged")
            check_header(part.header, str(part.path))
        self.first = self.parts[0, 0, 0]
        self.layouts: dict[str, tuple[int, FragmentLayout]] = {}
        for stage in range(mesh.stages):
            for layout in self.parts[stage, 0, 0].header.fragments:
                if not layout.copied:
                    self.layouts[layout.name] = stage, layout

    def stage(self, name: str) -> int:
        """The pipeline stage that holds a parameter."""
        if name not in self.layouts:
            raise CheckpointError(f"LoRDO: {self.folder} holds no parameter {name}")
        return self.layouts[name][0]

    def slices(self, name: str) -> list[tuple[list[Place], list[SavedPart]]]:
        """For every tensor slice, its places on the shards and the parts that hold them."""
        stage, layout = self.layouts[name]
        mesh = self.first.header.mesh
        found = []
        for index in range(layout.partitions if layout.partition_dim is not None else 1):
            parts = [self.parts[stage, index, shard] for shard in range(mesh.shards)]
            layouts = [self._layout(part, name) for part in parts]
            check_cover(layouts, str(self.folder))
            intervals = tuple(one.interval for one in layouts)
            places = [Place(one, intervals, shard, index) for shard, one in enumerate(layouts)]
            found.append((places, parts))
        return found

    def _layout(self, part: SavedPart, name: str) -> FragmentLayout:
        cache: dict[Path, dict[str, FragmentLayout]] = self.__dict__.setdefault("_by_path", {})
        if part.path not in cache:
            cache[part.path] = {layout.name: layout for layout in part.header.fragments}
        if name not in cache[part.path]:
            raise CheckpointError(f"LoRDO: {part.path} knows no {name}, other ranks of the replica do")
        return cache[part.path][name]

    def model(self, stage: int, index: int) -> dict[str, Any]:
        """The model's file of one stage and tensor slice."""
        cache: dict[tuple[int, int], dict[str, Any]] = self.__dict__.setdefault("_models", {})
        if (stage, index) not in cache:
            part = self.parts[stage, index, 0]
            cache[stage, index] = checked_dict(read_saved(model_file(part.path)), part.path)
        return cache[stage, index]


class NativeRun(SavedRun):
    """A tag that a LoRDO engine saved."""

    def __init__(self, path: str | Path, tag: str | None = None) -> None:
        self.path = tag_folder(path, tag)
        read_complete(self.path)
        folders = replica_folders(self.path)
        self.replicas = len(folders)
        self._opened: dict[int, _Replica] = {}
        first = self._replica(0)
        self.settings = first.first.header.settings
        mesh, engine = first.first.header.mesh, first.first.header.engine
        self.mesh = f"{mesh}, ZeRO stage {engine.zero_stage}, {engine.precision}"
        if mesh.replicas != self.replicas:
            raise CheckpointError(
                f"LoRDO: {self.path} holds {self.replicas} replicas, and was saved by {mesh.replicas}"
            )
        self.parameters = {
            name: SavedParameter(name, layout.whole_shape, layout.low_rank, layout.side, layout.rank)
            for name, (_, layout) in first.layouts.items()
        }

    def _replica(self, replica: int) -> _Replica:
        if replica not in self._opened:
            self._opened[replica] = _Replica(self.path / f"replica_{replica}")
        return self._opened[replica]

    def state(self, name: str, replica: int) -> State:
        found = self._replica(replica)
        stage = found.stage(name)
        slices = found.slices(name)
        state: State = {
            "weight": join(
                "weight",
                [
                    (places, [
                        part.weight(place.layout, found.model(stage, place.slice) if part.masters is None else {})
                        for place, part in zip(places, parts, strict=True)
                    ])
                    for places, parts in slices
                ],
            )
        }  # fmt: skip
        saved = [[part.state(place.layout) for place, part in zip(*one, strict=True)] for one in slices]
        for key, value in saved[0][0].items():
            if key in PLAIN_VALUES:
                check_plain(key, value, name, str(found.folder))
                state[key] = value
                continue
            if not all(isinstance(one.get(key), Tensor) for of_slice in saved for one in of_slice):
                raise CheckpointError(
                    f"LoRDO: {found.folder}: {key!r} of {name} is missing or no tensor: it is damaged"
                )
            state[key] = join(
                key,
                [(places, [one[key] for one in of_slice]) for (places, _), of_slice in zip(slices, saved, strict=True)],
            )
        return state

    def check_state(self, name: str, replica: int) -> None:
        found = self._replica(replica)
        stage = found.stage(name)
        for places, parts in found.slices(name):
            for place, part in zip(places, parts, strict=True):
                part.weight(place.layout, found.model(stage, place.slice) if part.masters is None else {})
                check_part(part.state(place.layout), place, str(part.path))

    def counters(self, replica: int) -> Counters:
        return self._replica(replica).first.header.counters

    def bytes_sent(self, replica: int) -> dict[str, int]:
        return self._replica(replica).first.header.bytes_sent

    def rows(self) -> list[list[float]]:
        tables = []
        for replica in range(self.replicas):
            parts = self._replica(replica).parts
            tables += [
                [list(row) for row in p.header.rows] for (stage, cut, _), p in parts.items() if stage == cut == 0
            ]
        return mean_rows(tables)

    def untrained(self, replica: int) -> dict[str, Tensor]:
        found = self._replica(replica)
        mesh = found.first.header.mesh
        tensors: dict[str, Tensor] = {}
        for stage in range(mesh.stages):
            header = found.parts[stage, 0, 0].header
            for one in header.engine.untrained:
                slices = range(one.partitions if mesh.slices > 1 else 1)
                parts = [part for index in slices if (part := _untrained(found, stage, index, one)) is not None]
                if len(parts) < len(slices):
                    continue  # saved with exclude_frozen_parameters
                dim = one.partition_dim if one.partitions > 1 else None
                tensors[one.name] = join_slices(parts, dim, one.partition_stride)
        return tensors

    def engine_state(self, replica: int) -> EngineState:
        found = self._replica(replica)
        model, first = found.model(0, 0), found.first
        return EngineState(
            global_steps=int(model.get("global_steps", 0)),
            global_samples=int(model.get("global_samples", 0)),
            skipped_steps=int(model.get("skipped_steps", 0)),
            lr_scheduler=model.get("lr_scheduler"),
            param_groups=[{k: v for k, v in group.items() if k != "params"} for group in first.base["param_groups"]],
            loss_scale=_loss_scale(first.wrapper),
            client_state={key: value for key, value in model.items() if key not in _ENGINE_KEYS},
        )


def _untrained(replica: _Replica, stage: int, index: int, one: Untrained) -> Tensor | None:
    """One slice of a frozen parameter, or a buffer; None where it was not saved."""
    part, model = replica.parts[stage, index, 0], replica.model(stage, index)
    fragments = model.get("frozen_param_fragments") or {}
    if part.header.engine.zero_stage < 3 or one.name not in fragments:
        found = part.entry(one.name, model)
        if found is not None and tuple(found.shape) != one.shape:
            raise CheckpointError(
                f"LoRDO: {part.path}: {one.name} is {tuple(found.shape)}, not {one.shape}: it is damaged"
            )
        return found
    shards = replica.first.header.mesh.shards
    models = [read_saved(model_file(replica.parts[stage, index, shard].path)) for shard in range(shards)]
    pieces = [checked_dict(found.get("frozen_param_fragments"), part.path).get(one.name) for found in models]
    size = torch.Size(one.shape).numel()
    if not all(isinstance(piece, Tensor) for piece in pieces) or sum(piece.numel() for piece in pieces) < size:  # type: ignore[union-attr]
        raise CheckpointError(f"LoRDO: {part.path.parent}: the shards of {one.name} do not make it up: it is damaged")
    flat = torch.cat([piece.reshape(-1) for piece in pieces])  # type: ignore[union-attr]
    return flat[: torch.Size(one.shape).numel()].view(one.shape)


def _loss_scale(wrapper: Mapping[str, Any]) -> dict[str, float | int]:
    """The values of fp16's loss scaler, by the attribute names that both of DeepSpeed's kinds share."""
    scaler = wrapper.get("loss_scaler")
    found = wrapper if scaler is None else vars(scaler)
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {name: found[name] for name in names if isinstance(found.get(name), (int, float))}
