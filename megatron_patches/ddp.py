"""Replicas for Megatron's own training loop: its data-parallel group ends at the replica's edge.

    with replicas(replica_size=1) as mine:
        model = DistributedDataParallel(config, ddp_config, gpt)

Inside the block the data-parallel *groups* of `parallel_state` are the replica's: everything that Megatron reduces,
broadcasts or scales by (gradients, and 1 / size) stays inside it. The data-parallel *rank* and *size* that
`parallel_state` tells keep counting all ranks of all replicas, because samplers ask for those: a sampler that took
them from a replica would feed every replica the same samples, silently. Outside the block all is as before;
`mine.groups_for_megatron()` is for code that takes a `pg_collection`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection

from lordo_ds.comm.groups import ReplicaGroups, replica_groups
from lordo_ds.comm.nodes import layout_of_replicas
from lordo_ds.errors import ConfigError
from lordo_ds.sync.alike import Start, require_alike
from megatron_patches.versions import MegatronMismatchError, require_parameters, require_supported_version

# Of `parallel_state`: what becomes the replica's group, its ranks, and what no replica has (its getters then refuse).
_GROUPS = (
    "_DATA_PARALLEL_GROUP",
    "_DATA_PARALLEL_GROUP_WITH_CP",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP",
    "_EXPERT_DATA_PARALLEL_GROUP",
    "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP",
)
_RANKS = ("_DATA_PARALLEL_GLOBAL_RANKS", "_DATA_PARALLEL_GLOBAL_RANKS_WITH_CP")
_NONE = (
    "_DATA_PARALLEL_GROUP_GLOO",
    "_DATA_PARALLEL_GROUP_WITH_CP_GLOO",
    "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO",
    "_EXPERT_DATA_PARALLEL_GROUP_GLOO",
    "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_GLOO",
    "_INTER_PARTIAL_EXPERT_DATA_PARALLEL_GROUP",
    "_DATA_PARALLEL_GROUP_WITH_CP_AG",
    "_TENSOR_AND_DATA_PARALLEL_GROUP",
    "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP",
)
# What `parallel_state` answers in place of a group's own rank and size, where set.
_RANK, _SIZE = "_MPU_DATA_PARALLEL_RANK", "_MPU_DATA_PARALLEL_WORLD_SIZE"

_WITH_CP = ("with_context_parallel", "partial_data_parallel")
_SIGNATURES: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
    (parallel_state, "get_data_parallel_group", (*_WITH_CP, "independent_all_gather")),
    (parallel_state, "get_data_parallel_rank", _WITH_CP),
    (parallel_state, "get_data_parallel_world_size", _WITH_CP),
    (
        DistributedDataParallel,
        "__init__",
        ("self", "config", "ddp_config", "module", "disable_bucketing", "pg_collection"),
    ),
)
_FINALIZE_MODULE = "megatron.core.distributed.finalize_model_grads"
_FINALIZE = ("model", "num_tokens", "pg_collection", "force_all_reduce")

_active: list[Replicas] = []


@dataclass(frozen=True)
class Replicas:
    """This rank's replica, as `replicas` made it.

    `data_parallel_rank` and `data_parallel_size` count all ranks of all replicas: samplers take these.
    """

    groups: ReplicaGroups
    data_parallel_rank: int
    data_parallel_size: int

    @property
    def ranks(self) -> tuple[int, ...]:
        """dist_ranks of this replica that hold the same parameters: Megatron's data-parallel group."""
        return tuple(dist.get_process_group_ranks(self.groups.shard))

    def groups_for_megatron(self) -> ProcessGroupCollection:
        """A `pg_collection` for DistributedDataParallel and for the schedules, with the replica's groups."""
        collection = ProcessGroupCollection.use_mpu_process_groups()
        for name in ("dp", "dp_cp", "intra_dp_cp", "expt_dp", "intra_expt_dp"):
            setattr(collection, name, self.groups.shard)
        for name in ("inter_dist_opt", "tp_dp_cp"):
            setattr(collection, name, None)
        return collection

    def finalize(self) -> Callable[..., None]:
        """`finalize_model_grads` for `config.finalize_model_grads_func`: it counts the replica's tokens only.

        The schedules look the data-parallel group up in every step, outside the block too, and with
        `calculate_per_token_loss` divide the gradients by the number of tokens summed over it.
        """
        require_parameters(importlib.import_module(_FINALIZE_MODULE), "finalize_model_grads", _FINALIZE)

        @functools.wraps(finalize_model_grads)
        def finalize_in_replica(
            model: list[Any], num_tokens: Any = None, pg_collection: Any = None, **named: Any
        ) -> None:
            here = self.groups_for_megatron() if pg_collection is None else _copied(pg_collection)
            here.dp_cp = self.groups.shard
            finalize_model_grads(model, num_tokens, pg_collection=here, **named)

        finalize_in_replica.lordo_replicas = self  # type: ignore[attr-defined]
        return finalize_in_replica

    def check(self, model_chunks: Sequence[Any]) -> None:
        """Refuse chunks that are no DistributedDataParallel, or whose gradients would leave the replica.

        Raises:
            ConfigError: naming the chunk, the ranks and the way out.
        """
        for index, chunk in enumerate(model_chunks):
            if not isinstance(chunk, DistributedDataParallel):
                raise ConfigError(
                    f"LoRDO: model chunk {index} is a {type(chunk).__name__}: wrap it in megatron.core.distributed."
                    "DistributedDataParallel (FSDP wrappers are not supported)"
                )
            groups = {"its broadcasts": chunk.dp_cp_group}
            for number, bucket_group in enumerate(chunk.bucket_groups + chunk.expert_parallel_bucket_groups):
                groups[f"bucket group {number}"] = bucket_group.data_parallel_group
            for what, group in groups.items():
                ranks = tuple(dist.get_process_group_ranks(group))
                if ranks != self.ranks:
                    raise ConfigError(
                        f"LoRDO: model chunk {index} reduces gradients over the ranks {ranks} ({what}), its replica is "
                        f"{self.ranks}: build it inside `with megatron_patches.ddp.replicas(...)`"
                    )


def _copied(collection: ProcessGroupCollection) -> ProcessGroupCollection:
    return ProcessGroupCollection(**vars(collection))


@contextmanager
def replicas(replica_size: int | str = 1) -> Iterator[Replicas]:
    """Cut the data-parallel ranks into replicas, and end Megatron's data-parallel groups at the replica's edge.

    Collective: all ranks enter it, after `initialize_model_parallel`. On the way out, also by an exception,
    `parallel_state` is put back.

    Args:
        replica_size: data-parallel ranks of one replica, "node" (those of one node) or "all" (one replica).

    Raises:
        ConfigError: the size does not divide the data-parallel size, context parallelism, or a block in a block.
        MegatronMismatchError: this megatron-core is not one this was written for; nothing is changed then.
    """
    if _active:
        raise ConfigError("LoRDO: `replicas` is entered already: leave that block first")
    _check_version()
    mine = _make(replica_size)
    ours: dict[str, Any] = dict.fromkeys(_GROUPS, mine.groups.shard)
    ours |= {name: list(mine.ranks) for name in _RANKS} | dict.fromkeys(_NONE)
    ours |= {_RANK: mine.data_parallel_rank, _SIZE: mine.data_parallel_size}
    before = {name: getattr(parallel_state, name) for name in ours}
    _set(ours)
    _active.append(mine)
    try:
        _check_answers(mine)
        yield mine
    finally:
        _active.pop()
        changed = [name for name, value in ours.items() if getattr(parallel_state, name) is not value]
        if not changed:
            _set(before)
        elif sys.exc_info()[0] is None:
            raise MegatronMismatchError(
                f"parallel_state.{changed[0]} was set by somebody else inside `replicas`: parallel_state stays as it is"
            )


def _set(values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(parallel_state, name, value)


def _check_version() -> None:
    require_supported_version()
    for owner, name, parameters in _SIGNATURES:
        require_parameters(owner, name, parameters)
    for name in (*_GROUPS, *_RANKS, *_NONE, _RANK, _SIZE):
        if not hasattr(parallel_state, name):
            raise MegatronMismatchError(f"parallel_state.{name} does not exist; `replicas` needs an update")


def _check_answers(mine: Replicas) -> None:
    """That the getters read what was set: their bodies are not part of their signatures."""
    for partial in (False, True):
        group = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=partial)
        if group is not mine.groups.shard:
            raise MegatronMismatchError("parallel_state.get_data_parallel_group does not tell the group that was set")
    told = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    if told != (mine.data_parallel_rank, mine.data_parallel_size):
        raise MegatronMismatchError("parallel_state.get_data_parallel_rank does not tell the rank that was set")


def _make(replica_size: int | str) -> Replicas:
    if parallel_state.get_context_parallel_world_size() > 1:
        raise ConfigError("LoRDO: context parallelism is not supported: set context_parallel_size to 1")
    require_alike(Start({"replica_size": repr(replica_size)}))
    ranks = dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
    groups = replica_groups(
        layout_of_replicas(ranks, replica_size, "replica_size"),
        dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group()),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    return Replicas(groups, ranks.index(dist.get_rank()), len(ranks))
