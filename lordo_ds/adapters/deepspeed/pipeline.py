"""LoRDO in DeepSpeed's PipelineEngine: its grid, its batch size, its tied weights.

Written against DeepSpeed 0.19.8. `PipelineModule` refuses an `mpu` and answers with its own grid, whose data-parallel
groups span the replicas; the engine gets a view of that grid instead, for as long as it lives. Stages of one replica
exchange activations, tied gradients and norms as before: pipeline and tensor groups have one data-parallel index, and
so one replica.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from lordo_ds.adapters.deepspeed.replica_mpu import DataParallelOfReplica
from lordo_ds.adapters.patching import check_parameters, replace_method
from lordo_ds.comm.groups import ReplicaGroups
from lordo_ds.errors import ConfigError


def is_pipeline(engine: Any) -> bool:
    """Whether the engine runs a pipeline schedule (also with one stage)."""
    return isinstance(engine, PipelineEngine)


# -- the grid ----------------------------------------------------------------------------------------


class ReplicaGrid(DataParallelOfReplica, PipelineParallelGrid):  # type: ignore[misc]  # DeepSpeed has no types
    """A view of a pipeline's grid in which data parallelism ends at the replica's edge.

    It shares the topology, the stages and every other group with the grid, which is not changed.
    """

    def __init__(self, whole: PipelineParallelGrid, groups: ReplicaGroups) -> None:
        self.__dict__.update(whole.__dict__)  # the base class would create all groups anew
        self.whole = whole
        self.groups = groups
        self.dp_group = list(groups.layout.shard_group(whole.global_rank))
        self.dp_proc_group = groups.shard
        self.data_parallel_size = groups.layout.replica_size
        self.data_parallel_id = groups.shard_index

    def get_data_parallel_id(self) -> int:
        return self.data_parallel_id


@contextmanager
def replica_grid(given: dict[str, Any], groups: ReplicaGroups) -> Iterator[None]:
    """Give the engine that is being built from `given` the replica's grid; taken back if building it fails."""
    module = given["model"]
    given["mpu"] = module._grid = ReplicaGrid(module._grid, groups)
    try:
        yield
    except BaseException:
        give_grid_back(module)
        raise


def give_grid_back(module: PipelineModule) -> None:
    """Undo what `replica_grid` did to the module."""
    if isinstance(module._grid, ReplicaGrid):
        module._grid = module._grid.whole
    module.__dict__.pop("save_state_dict", None)


@contextmanager
def batch_of_replica(config: Any, groups: ReplicaGroups) -> Iterator[None]:
    """The constructor checks the batch keys on the grid's data-parallel size, which is the replica's."""
    of_all, micro, accumulation = (
        config.train_batch_size,
        config.train_micro_batch_size_per_gpu,
        config.gradient_accumulation_steps,
    )
    config.train_batch_size = micro * accumulation * groups.layout.replica_size
    try:
        yield
    finally:
        config.train_batch_size = of_all


def count_all_samples(engine: PipelineEngine) -> None:
    """Let the throughput timers, made under `batch_of_replica`, count the samples of all replicas."""
    for timer in (engine.tput_timer, engine.batch_timer):
        timer.batch_size = engine.train_batch_size()


# -- tied weights ------------------------------------------------------------------------------------


def tied_copies(module: nn.Module) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
    """Weights of this rank that other stages hold copies of; none outside a pipeline.

    Returns:
        (the parameter, the dist_ranks that hold it: one per stage, in the order of the stages, of this rank's
        data-parallel and tensor index), in an order that is the same on all of them.
    """
    if not isinstance(module, PipelineModule):
        return []
    found = []
    for tie in module.tied_comms.values():
        for attribute in tie["weight_attr"]:
            weight = module._recursive_getattr(tie["module"], attribute)
            if len(tie["ranks"]) > 1:
                found.append((weight, tuple(tie["ranks"])))
    return found


def check_pipeline(engine: PipelineEngine, groups: ReplicaGroups) -> None:
    """Refuse what DeepSpeed would train wrongly, or wait for forever. Collective inside the replica.

    Raises:
        ConfigError: on all ranks of the replica, also where only one stage has something to say.
    """
    # ZeRO reduces one norm per parameter group: with other counts on other stages they would wait for each other.
    norms = len(engine.optimizer.param_groups) if type(engine.optimizer) is DeepSpeedZeroOptimizer else 1
    found: list[tuple[str, int]] = [("", 0)] * dist.get_world_size(groups.inside)
    dist.all_gather_object(found, (_complaint(engine, groups), norms), group=groups.inside)
    for complaint, _ in found:
        if complaint:
            raise ConfigError(f"LoRDO: {complaint}")
    counts = sorted({count for _, count in found})
    if len(counts) > 1:
        raise ConfigError(
            f"LoRDO: the stages of the pipeline have {counts} parameter groups: DeepSpeed's ZeRO needs equally many on "
            "each, use stage 0 or one group"
        )


def _complaint(engine: PipelineEngine, groups: ReplicaGroups) -> str:
    """What is wrong with this rank's stage; empty if nothing is."""
    inside = dist.get_process_group_ranks(groups.inside)
    ties = engine.module.tied_comms
    for name, ranks in (
        ("model-parallel", dist.get_process_group_ranks(engine.mpu.get_model_parallel_group())),
        ("pipeline", engine.grid.pp_group),
        *(("tied", tie["ranks"]) for tie in ties.values()),
    ):
        if not set(ranks) <= set(inside):
            return f"the {name} ranks {ranks} are not in one replica, {inside}: use DeepSpeed's topologies"
    copies = tied_copies(engine.module)
    if copies and getattr(engine.optimizer, "use_grad_accum_attribute", False):
        return (
            "DeepSpeed 0.19.8 does not reduce the gradients of tied weights that it accumulates in another precision: "
            "leave data_types.grad_accum_dtype out"
        )
    tied = {weight for weight, _ in copies}
    for key, tie in ties.items():
        for name, parameter in tie["module"].named_parameters():
            if len(tie["ranks"]) > 1 and parameter.requires_grad and parameter not in tied:
                return (
                    f"{name} of the TiedLayerSpec {key!r} is not in its tied_weight_attr {tie['weight_attr']}, so "
                    "every stage would train a copy of its own: tie it too, or give it a layer of its own"
                )
    return ""


# -- the engine's methods ----------------------------------------------------------------------------


def replace_instruction(
    engine: PipelineEngine, instruction: type, parameters: tuple[str, ...], make: Callable[[Any], Any], version: str
) -> None:
    """Replace what one instruction of the schedule runs, on this engine only; the class holds functions in a map."""
    original = engine._INSTRUCTION_MAP[instruction]
    check_parameters(original, f"PipelineEngine.{original.__name__}", parameters, version)
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, instruction: make(original)}


def scale_last_stage(engine: PipelineEngine, loss_scale: Callable[[], float | None], version: str) -> None:
    """Scale the loss of the last stage by what stage 0's fp16 wrapper divides gradients by; DeepSpeed forgets it."""

    def scaled(original: Any) -> Any:
        @functools.wraps(original)
        def backward_pass(engine: PipelineEngine, buffer_id: int) -> None:
            if not engine.is_last_stage():
                original(engine, buffer_id)
                return
            scale = loss_scale() or 1.0

            def scale_gradient(gradient: Tensor) -> Tensor:
                return gradient * scale

            handle = engine.loss.register_hook(scale_gradient)
            try:
                original(engine, buffer_id)
            finally:
                handle.remove()

        return backward_pass

    replace_instruction(engine, schedule.BackwardPass, ("self", "buffer_id"), scaled, version)


def save_first_replica_only(engine: PipelineEngine, replica_index: int, version: str) -> None:
    """`module.save_state_dict(path)`, called by the user: the replicas would write the same files at once.

    Inside `save_checkpoint`, which has a folder for each replica, all write theirs.
    """

    def one_replica(original: Any) -> Any:
        @functools.wraps(original)
        def save_state_dict(*args: Any, **kwargs: Any) -> None:
            if replica_index == 0 or getattr(engine, "_curr_ckpt_path", None) is not None:
                original(*args, **kwargs)

        return save_state_dict

    replace_method(engine.module, "save_state_dict", ("save_dir", "checkpoint_engine"), one_replica, version)
