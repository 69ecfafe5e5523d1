"""Which parameters are projected, on which side, at which rank, and why. Plain values, no processes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lordo_ds.config import LordoConfig
from lordo_ds.errors import ConfigError

OUTPUT_HEAD_NAMES = ("lm_head", "output_layer", "embed_out", "head")


@dataclass(frozen=True)
class ParameterFacts:
    """What a model says of one parameter.

    `partition_dim` is the tensor-parallel dimension (megatron-core sets it even at size 1), or None; `partitions` is
    the number of ranks that hold a slice of it along that dimension. `shape` is that of the slice. A slice of
    `partition_stride` 2 holds a part of each of two matrices (gated fc1: [gate; up]). `embedding_name` is what in the
    name calls it an embedding, where names are all that is known. `position` is its place in the model's order, 0 for
    all where there is no model.
    """

    name: str
    shape: tuple[int, ...]
    embedding: bool = False
    tied_to_embedding: bool = False
    embedding_or_output: bool = False
    partition_dim: int | None = None
    named: bool = True
    partitions: int = 1
    partition_stride: int = 1
    embedding_name: str = ""
    position: int = 0


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter is stepped. `side` is the side that carries the basis, "rows" or "columns".

    `shape` is that of this rank's slice; with tensor parallelism `partitions` ranks hold one each, and no slice cuts
    the side that carries the basis.
    """

    name: str
    shape: tuple[int, ...]
    low_rank: bool
    reason: str
    side: str = ""
    rank: int = 0
    # The basis lies on the larger side, because the smaller one is sharded by tensor parallelism.
    on_larger_side: bool = False
    rank_clipped: bool = False
    partitions: int = 1

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def basis_side(self) -> int:
        """s, the length of the side that carries the basis."""
        return self.shape[0] if self.side == "rows" else self.shape[1]

    @property
    def other_side(self) -> int:
        """l, the length of the other side, on this rank."""
        return self.shape[1] if self.side == "rows" else self.shape[0]

    @property
    def whole_other_side(self) -> int:
        """l of the whole matrix."""
        return self.other_side * self.partitions

    def orient(self, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix as a view with its basis side first."""
        return matrix if self.side == "rows" else matrix.mT


def plan_parameters(
    config: LordoConfig, facts: Iterable[ParameterFacts], whole_model: Iterable[ParameterFacts] | None = None
) -> list[ParameterPlan]:
    """Plan every parameter; the order is kept.

    Args:
        whole_model: the parameters of all pipeline stages, where `facts` are those of one.

    Raises:
        ConfigError: a pattern matches no parameter, or nothing is left to project although nothing was
            excluded on purpose.
    """
    facts = list(facts)
    model = facts if whole_model is None else list(whole_model)
    selection = config.low_rank
    for key, patterns in (("include", selection.include or ()), ("exclude", selection.exclude)):
        for pattern in patterns:
            if not any(fact.named and re.search(pattern, fact.name) for fact in model) and pattern != ".*":
                raise ConfigError(
                    f"LoRDO: {config.key('low_rank')}.{key}: {pattern!r} matches no parameter name; "
                    f"names look like {model[0].name!r}"
                    if model
                    else f"LoRDO: {config.key('low_rank')}.{key}: there are no parameters to match"
                )
    plans = [_plan(config, fact) for fact in facts]
    if model and not selection.exclude and not any(_select(config, fact)[0] for fact in model):
        raise ConfigError(
            "LoRDO: no parameter can be projected (no 2-D weight besides embeddings and output heads): "
            f'set {config.key("low_rank")} to {{"exclude": [".*"]}} if AdamW for all of them is intended'
        )
    return plans


def _plan(config: LordoConfig, fact: ParameterFacts) -> ParameterPlan:
    low_rank, reason = _select(config, fact)
    if not low_rank:
        return ParameterPlan(fact.name, fact.shape, False, reason, partitions=fact.partitions)
    # Side and rank follow the whole matrix: they must not change with the tensor-parallel size.
    rows, columns = (
        size * (fact.partitions if dim == fact.partition_dim else 1) for dim, size in enumerate(fact.shape)
    )
    if fact.partition_dim is None:
        side, why = ("rows", "smaller side") if rows < columns else ("columns", "smaller side")
    else:
        # The side that tensor parallelism shards must not carry the basis: a step then needs no communication.
        side, why = ("columns", "unsharded side") if fact.partition_dim == 0 else ("rows", "unsharded side")
    basis_side = rows if side == "rows" else columns
    rank = min(config.rank_for(min(rows, columns)), basis_side)
    return ParameterPlan(
        fact.name,
        fact.shape,
        True,
        f"{reason}; basis on {side} ({why})",
        side=side,
        rank=rank,
        on_larger_side=basis_side > min(rows, columns),
        rank_clipped=isinstance(config.rank, int) and config.rank > rank,
        partitions=fact.partitions,
    )


def _select(config: LordoConfig, fact: ParameterFacts) -> tuple[bool, str]:
    selection = config.low_rank
    for pattern in selection.exclude:
        if re.search(pattern, fact.name):
            return False, f"excluded by {pattern!r}"
    if selection.include is not None:
        for pattern in selection.include:
            if re.search(pattern, fact.name):
                if len(fact.shape) == 2:
                    return True, f"included by {pattern!r}"
                return False, f"{len(fact.shape)}-D"
        return False, "not included"
    if len(fact.shape) != 2:
        return False, f"{len(fact.shape)}-D"
    if fact.embedding:
        return False, "embedding"
    if fact.tied_to_embedding:
        return False, "tied to an embedding"
    if fact.embedding_or_output:
        return False, "embedding or output (marked by the model)"
    if fact.embedding_name:
        return False, f"embedding, by its name ({fact.embedding_name})"
    parts = fact.name.split(".")
    if fact.named and len(parts) > 1 and parts[-2] in OUTPUT_HEAD_NAMES:
        return False, f"output head ({parts[-2]})"
    return True, "2-D weight" if fact.named else "2-D, without a name"


def model_facts(model: nn.Module, tensor_size: int = 1) -> dict[nn.Parameter, ParameterFacts]:
    """Facts about every parameter of a model, keyed by the parameter; tied parameters appear once.

    The shape is that of the parameter as it stands (ZeRO-3 parameters keep theirs in `ds_shape`). A model that is cut
    into pipeline stages may have a method `name_in_one_piece(name)`: the name that the same parameter has in the
    model in one piece. It then goes by that name in patterns, messages and checkpoints.

    Args:
        tensor_size: ranks over which tensor parallelism slices the parameters that are marked with
            `tensor_model_parallel` and `partition_dim`, megatron-core's attributes.

    Raises:
        ConfigError: a parameter is marked as sliced, but not along which dimension.
    """
    names: dict[nn.Parameter, list[str]] = {}
    rename = getattr(model, "name_in_one_piece", str)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(rename(name))
    embeddings: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Embedding"):
            embeddings.update(module.parameters(recurse=False))
    facts = {}
    for position, (parameter, all_names) in enumerate(names.items()):
        partition_dim, sliced = _partition_dim(parameter), bool(getattr(parameter, "tensor_model_parallel", False))
        if sliced and tensor_size > 1 and partition_dim is None:
            raise ConfigError(
                f"LoRDO: {all_names[0]} is marked tensor_model_parallel without a partition_dim of 0 or 1: set it, as "
                "megatron-core's layers do, or the basis could lie on the side that is sliced"
            )
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        facts[parameter] = ParameterFacts(
            name=all_names[0],
            shape=shape,
            embedding=parameter in embeddings and len(all_names) == 1,
            tied_to_embedding=parameter in embeddings and len(all_names) > 1,
            embedding_or_output=bool(
                getattr(parameter, "is_embedding_or_output_parameter", False)
                or getattr(parameter, "shared_embedding", False)
            ),
            partition_dim=partition_dim,
            partitions=tensor_size if sliced else 1,
            partition_stride=int(getattr(parameter, "partition_stride", 1)) if sliced else 1,
            position=position,
        )
    return facts


def _partition_dim(parameter: nn.Parameter) -> int | None:
    dim = getattr(parameter, "partition_dim", None)  # megatron-core's default is -1: not sharded
    return dim if dim in (0, 1) else None
