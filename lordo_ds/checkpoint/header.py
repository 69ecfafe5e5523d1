"""The header of a saved optimizer state: where every element of it lies, so that it can be read without the model.

Each rank saves one `Header` beside its tensors. It is plain values only, validated when read: a checkpoint that was
changed or made by something else is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lordo_ds.config import JSON_PATH
from lordo_ds.errors import CheckpointError

STATE_FORMAT, OLDEST_STATE_FORMAT = 3, 2

# Settings that say what the saved tensors mean; the others may change between saving and loading.
MEANING = ("qh_mode", "error_feedback", "projection")
RESHAPE_HINT = (
    "give what it was saved with, or load it with lordo_ds.load_checkpoint(engine, ..., reshape=True) "
    "(`lordo ckpt show` tells what it holds)"
)
# Without an engine there is nobody who could put it together from the files of other ranks.
OWN_FILE_HINT = "load the file that this rank saved itself, in a run of as many ranks and with the same settings"


LARGEST = 2**63 - 1  # torch counts in 64 bits
_DEEPEST, _MOST_SETTINGS = 16, 10_000
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]


def _bounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) > 64 or math.prod(size for size in shape if size) > LARGEST:
        raise ValueError("no tensor has so many elements")
    return shape


Shape = Annotated[tuple[NonNegativeInt, ...], AfterValidator(_bounded)]


def _small(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what is nested so deep, or so often, that printing or comparing it would not come to an end."""
    level: list[Any] = [value]
    seen = 0
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, (dict, list, tuple)):
                inner += one.values() if isinstance(one, dict) else one
                seen += len(one)
                if seen > _MOST_SETTINGS:
                    raise ValueError(f"more than {_MOST_SETTINGS} values")
        level = inner
    if level:
        raise ValueError(f"nested deeper than {_DEEPEST}")
    return value


PlainSettings = Annotated[dict[str, Any], AfterValidator(_small)]


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Mesh(_Plain):
    """Sizes of the mesh and the place of the rank that saved on it; at stage 0 a replica has one shard."""

    replicas: PositiveInt = 1
    replica: NonNegativeInt = 0
    shards: PositiveInt = 1
    shard: NonNegativeInt = 0
    slices: PositiveInt = 1
    slice: NonNegativeInt = 0
    stages: PositiveInt = 1
    stage: NonNegativeInt = 0

    @property
    def inside(self) -> tuple[int, int, int]:
        """(stage, slice, shard): the place inside the replica."""
        return self.stage, self.slice, self.shard

    @property
    def place(self) -> dict[str, int]:
        """What is this rank's own of it."""
        return {key: getattr(self, key) for key in ("replica", "shard", "slice", "stage")}

    def __str__(self) -> str:
        return f"{self.replicas} replicas x {self.shards} shards, TP {self.slices}, PP {self.stages}"


class FragmentLayout(_Plain):
    """One parameter of a rank: its plan, and where its elements lie in the tensors that the rank steps.

    `shape` is that of the tensor-parallel slice, `interval` the elements [start, stop) of it that this shard holds,
    from `offset` on in tensor number `tensor` of the optimizer's parameter groups. `copied`: another stage's counts.
    `owned` are the elements of the slice that the replica owned, of those that this shard holds.
    """

    name: str
    shape: Shape
    partition_dim: int | None
    partitions: PositiveInt
    partition_stride: PositiveInt
    low_rank: bool
    side: str
    rank: NonNegativeInt
    interval: tuple[NonNegativeInt, NonNegativeInt]
    tensor: NonNegativeInt
    offset: NonNegativeInt
    copied: bool = False
    owned: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)

    @property
    def numel(self) -> int:
        """Of the slice."""
        return math.prod(self.shape)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of the parameter of a model without tensor parallelism."""
        return tuple(
            size * (self.partitions if dim == self.partition_dim else 1) for dim, size in enumerate(self.shape)
        )


class Untrained(_Plain):
    """A parameter that no optimizer steps; its slice's shape, and how it is cut by tensor parallelism."""

    name: str
    shape: Shape
    partition_dim: int | None = None
    partitions: PositiveInt = 1
    partition_stride: PositiveInt = 1


class EngineFacts(_Plain):
    """What the engine says of its files.

    `places` holds, by parameter or buffer, the file and the key of its weight where that is not the entry `module` of
    the model's file: a pipeline writes one file per layer.
    """

    zero_stage: NonNegativeInt = 0
    wrapper: str = ""
    precision: str = "fp32"
    places: dict[str, tuple[str, str]] = {}
    untrained: tuple[Untrained, ...] = ()


class Counters(_Plain):
    """Steps and syncs of one replica."""

    attempted_steps: NonNegativeInt = 0
    executed_steps: NonNegativeInt = 0
    syncs: NonNegativeInt = 0
    nonfinite_syncs: NonNegativeInt = 0
    left_out_syncs: NonNegativeInt = 0
    last_synced_step: NonNegativeInt = 0

    @property
    def synced(self) -> bool:
        """Whether the last step ended in a sync (or there was none yet): the replicas hold equal weights."""
        return self.attempted_steps == self.last_synced_step


class Header(_Plain):
    """Everything about one rank's optimizer state that is not a tensor.

    `owned_over`: where a state is of whole parameters, what owners keep of them among it, and it is to be cut over as
    many shards and tensor slices again; None where each rank's file says what was owned.
    """

    format: int
    settings: PlainSettings
    mesh: Mesh
    fragments: tuple[FragmentLayout, ...]
    engine: EngineFacts = EngineFacts()
    counters: Counters
    bytes_sent: dict[str, int]
    rows: tuple[tuple[float, ...], ...]
    owned_over: tuple[PositiveInt, PositiveInt] | None = None

    @classmethod
    def of(cls, state: Any, where: str) -> Header:
        """The header of a saved optimizer state.

        Raises:
            CheckpointError: it is not one of LoRDO, or of another format, or damaged.
        """
        found = state.get("lordo") if isinstance(state, Mapping) else None
        if not isinstance(found, dict):
            raise CheckpointError(f"LoRDO: {where} was not saved by LoRDO: start without it, or load the weights only")
        check_format(found.get("format"), STATE_FORMAT, where, OLDEST_STATE_FORMAT)
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            raise CheckpointError(f"LoRDO: {where} is damaged: {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """Where the first difference from a model is, and what; of a length to be read."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(part)[:80] for part in first['loc'])[:200]}: {first['msg'][:200]}"


def check_format(found: Any, known: int, where: str, oldest: int | None = None) -> None:
    """Refuse what another version wrote.

    Args:
        known: the format that this version writes.
        oldest: that it still reads; default: that one only.

    Raises:
        CheckpointError: naming the format and what reads it.
    """
    if type(found) is int and (oldest or known) <= found <= known:
        return
    if found is not None and (type(found) is not int or abs(found) > LARGEST):
        raise CheckpointError(f"LoRDO: {where} is damaged: its format is no number that a version has")
    newer = found is not None and found > known
    advice = "install a newer lordo_ds" if newer else "load it with the version that saved it"
    raise CheckpointError(f"LoRDO: {where}: format {found!r} is not {known}: {advice}")


# -- what keeps a checkpoint from fitting a run ------------------------------------------------------


def refuse_differences(
    saved: Header, here: Header, where: str, path: str = JSON_PATH, hint: str = RESHAPE_HINT
) -> None:
    """Refuse a state that lies otherwise than this run's, or means something else.

    Args:
        path: what the user writes before our settings.
        hint: the way out.

    Raises:
        CheckpointError: the first difference, with both values, and how many more there are.
    """
    found = list(differences(saved, here, path))
    if found:
        more = f" (and {len(found) - 1} more differences)" if len(found) > 1 else ""
        raise CheckpointError(f"LoRDO: {where} does not fit this run: {found[0]}{more}: {hint}")


def differences(saved: Header, here: Header, path: str = JSON_PATH) -> Iterator[str]:
    """Readable differences, the most telling first."""
    for field in ("replicas", "shards", "slices", "stages", "replica", "shard", "slice", "stage"):
        yield from _difference(_MESH_WORDS[field], getattr(saved.mesh, field), getattr(here.mesh, field))
    yield from _difference("ZeRO stage", saved.engine.zero_stage, here.engine.zero_stage)
    yield from _difference("precision", saved.engine.precision, here.engine.precision)
    yield from _difference("DeepSpeed's optimizer", saved.engine.wrapper, here.engine.wrapper)
    for key in MEANING:
        yield from _difference(f"{path}{key}", saved.settings.get(key), here.settings.get(key))
    yield from _difference(f"{path}anchor.dtype", _anchor_dtype(saved), _anchor_dtype(here))
    if not saved.fragments:
        return  # saved before the first step: nothing but settings
    yield from _difference("number of parameters", len(saved.fragments), len(here.fragments))
    for theirs, ours in zip(saved.fragments, here.fragments, strict=False):
        yield from _difference("name of a parameter", theirs.name, ours.name)
        for field in FragmentLayout.model_fields:
            if field not in ("name", "owned"):  # what a replica owns follows from the settings of the wire
                words = _FRAGMENT_WORDS.get(field, field)
                yield from _difference(f"{words} of {ours.name}", getattr(theirs, field), getattr(ours, field))


def _anchor_dtype(header: Header) -> Any:
    return (header.settings.get("anchor") or {}).get("dtype")


def _difference(what: str, saved: Any, here: Any) -> Iterator[str]:
    if saved != here:
        yield f"{what}: saved {saved!r}, this run {here!r}"


_MESH_WORDS = {
    "replicas": "number of replicas",
    "shards": "shards of a replica",
    "slices": "tensor-parallel size",
    "stages": "pipeline stages",
    "replica": "replica",
    "shard": "shard",
    "slice": "tensor-parallel rank",
    "stage": "pipeline stage",
}
_FRAGMENT_WORDS = {
    "interval": "elements of this shard",
    "low_rank": "projection",
    "side": "side of the basis",
    "rank": "subspace rank",
    "tensor": "parameter-group tensor",
}
