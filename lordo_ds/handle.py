"""What a training script reads of a run with LoRDO, whichever engine drives it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DistributedSampler

from lordo_ds.comm.agreement import agreed
from lordo_ds.comm.groups import ReplicaGroups
from lordo_ds.optimizer import LoRDO
from lordo_ds.start_table import RunShape

HANDLE = "_lordo_hook"  # the attribute of an engine under which its handle is found


def hook(engine: Any) -> Any:
    """The handle of a LoRDO engine (`EngineHook` for DeepSpeed's), or None for one with another optimizer."""
    return getattr(engine, "__dict__", {}).get(HANDLE)


# What does the same where there is no engine.
_ALONE = {
    "data_sampler()": ", and without one a DistributedSampler over all ranks does the same",
    "save_checkpoint()": ", and without one every rank saves its model's and this state_dict() in a file of its own",
    "load_checkpoint()": ", and without one every rank loads its own file, the model first",
}


def require_hook(engine: Any, what: str = "this function") -> Any:
    """`hook`, of an engine that must have one.

    Raises:
        ValueError: it has another optimizer, or is none.
    """
    found = hook(engine)
    if found is None and isinstance(engine, LoRDO):
        raise ValueError(f"LoRDO: got a LoRDO optimizer: {what} takes a DeepSpeed engine{_ALONE.get(what, '')}")
    if found is None:
        raise ValueError('LoRDO: this engine was not built with "optimizer": {"type": "LoRDO"}')
    return found


def data_sampler(dataset: Any, engine: Any, shuffle: bool = True, seed: int = 0) -> DistributedSampler[Any]:
    """A sampler that gives every data-parallel rank of every replica its own part of the dataset."""
    found = require_hook(engine, "data_sampler()")
    return DistributedSampler(
        dataset, num_replicas=found.data_parallel_size, rank=found.data_parallel_rank, shuffle=shuffle, seed=seed
    )


class RunHandle:
    """Replicas, the next sync, bytes sent, and numbers averaged over replicas.

    `ddp_bytes_per_step` is what this rank would send across replicas per step if all gradients, which the engine has in
    `gradient_dtype`, were all-reduced; `zero_stage` how the engine shards a replica.
    """

    def __init__(self, optimizer: LoRDO, groups: ReplicaGroups) -> None:
        self.optimizer, self.groups = optimizer, groups
        self.ddp_bytes_per_step = 0
        self.gradient_dtype = torch.float32
        self.row_keys: list[str] = []

    @property
    def zero_stage(self) -> int:
        return 0

    def setting_texts(self) -> dict[str, str]:
        """The engine's own settings that all ranks must have alike, as texts by their keys."""
        return {}

    @property
    def driver(self) -> str:
        """What takes the steps, in a word or two."""
        return f"ZeRO stage {self.zero_stage}"

    @property
    def shape(self) -> RunShape:
        layout = self.groups.layout
        return RunShape(
            replicas=layout.replica_count,
            replica_index=self.groups.replica_index,
            replica_size=layout.replica_size,
            tensor_size=self.groups.tensor_size,
            pipe_size=self.groups.pipe_size,
            zero_stage=self.zero_stage,
            driver=self.driver,
        )

    @property
    def replicas(self) -> int:
        return self.groups.layout.replica_count

    @property
    def replica_index(self) -> int:
        return self.groups.replica_index

    @property
    def data_parallel_size(self) -> int:
        """Data-parallel ranks of all replicas together."""
        return self.groups.layout.replica_count * self.groups.layout.replica_size

    @property
    def data_parallel_rank(self) -> int:
        return self.groups.replica_index * self.groups.layout.replica_size + self.groups.shard_index

    @property
    def synced(self) -> bool:
        """Whether the last attempted step ended in a sync."""
        return self.optimizer.synced

    @property
    def next_sync_in(self) -> int:
        """Attempted steps until the end of the next one that is due."""
        return self.optimizer.next_sync_in

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank sent across replicas since the start of the run."""
        assert self.optimizer.sync is not None
        return self.optimizer.sync.wire.ledger.total_bytes

    @property
    def seconds_blocked(self) -> float:
        """Seconds for which what crosses replicas has blocked this rank since the start of the process."""
        assert self.optimizer.sync is not None
        return self.optimizer.sync.wire.ledger.total_seconds

    @property
    def blocked_per_step_s(self) -> float:
        """The same for each step of the last round: those after one sync up to the next, with that sync."""
        assert self.optimizer.sync is not None
        return self.optimizer.sync.traffic.blocked_per_step_s

    def record(self, **values: float) -> None:
        """Keep numbers of the step just attempted; their averages over replicas come with the next sync.

        Call it once per step with the same names on every rank. Averaging a loss at every step instead, over all
        data-parallel ranks, would send it through the slow network every time. A replica whose `loss` is not finite,
        though its step was not skipped, is left out of the next sync.
        """
        keys = sorted(values)
        if self.row_keys and keys != self.row_keys:
            raise ValueError(f"LoRDO: record() got {keys}, earlier {self.row_keys}: give the same names at every step")
        self.row_keys = keys
        assert self.optimizer.sync is not None
        if "loss" in values and self.optimizer.last_attempt_executed:
            self.optimizer.sync.faults.note_loss(float(values["loss"]), self.optimizer.attempted_steps)
        self.optimizer.sync.rows.add([float(values[key]) for key in keys])

    def averaged_rows(self) -> list[dict[str, float]]:
        """Rows that were averaged since the last call, in the order of their steps."""
        assert self.optimizer.sync is not None
        return [dict(zip(self.row_keys, row, strict=True)) for row in self.optimizer.sync.rows.take()]

    def finish(self) -> None:
        """Sync unless the last step ended in one, so that all replicas hold the same weights. Collective."""
        before = self.optimizer.executed_steps
        if self.optimizer.final_sync():
            self._after_final_sync(self.optimizer.executed_steps - before)

    def drain(self, before_load: bool = False) -> bool:
        """End the sync that is in flight, as every save of the engine's does first; whether one was. Collective.

        Args:
            before_load: whatever the weights are now, others will be in their place.

        Raises:
            CheckpointError: on some rank other weights are in their place, as in an evaluation.
        """
        optimizer, sync = self.optimizer, self.optimizer.sync
        if sync is None or sync.streaming.flight is None:
            return False
        if not before_load:
            agreed(lambda: sync.refuse_changed(optimizer.attempted_steps))
        before = optimizer.executed_steps
        optimizer.drain(before_load)
        self._after_final_sync(optimizer.executed_steps - before)
        return True

    def _after_final_sync(self, steps_taken_over: int) -> None:
        """A sync that ended between two steps changed the weights: low-precision copies are stale.

        Args:
            steps_taken_over: how many more steps another replica had executed.
        """
        raise NotImplementedError
