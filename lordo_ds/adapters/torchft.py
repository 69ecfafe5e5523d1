"""Replicas that leave and join while the others train: the cross-replica group, run by torchft.

Each replica is a job of its own (its own launcher and default process group). torchft's lighthouse knows who is there;
its manager gives every sync a quorum, and a process group over it:

    group = torchft.ProcessGroupGloo(timeout=...)
    manager = torchft.Manager(pg=group, load_state_dict=None, state_dict=None, min_replica_size=1,
                              use_async_quorum=False, timeout=..., quorum_timeout=..., replica_id="replica_0")
    membership = join_replicas(engine, manager, group)    # after deepspeed.initialize, before the first step
    while membership.step < steps:                        # a replica that joins late starts where the others are
        ...

torchft is not imported here: whoever wants it makes the manager. Written against torchft 0.2.0.

A replica that joins takes over the state of a live one at that one's next sync, in which it is left out of the
average. A sync that fails because a replica went away is undone, and done again by those who are left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, AllToAllOptions, BroadcastOptions

from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.schedule import sync_plan
from lordo_ds.core.state import OWNED, WIRE_ERRORS
from lordo_ds.errors import SyncError
from lordo_ds.handle import hook
from lordo_ds.optimizer import LoRDO
from lordo_ds.saved_state import SYNC_COUNTERS
from lordo_ds.sync.alike import Start, require_like, start_of_replica
from lordo_ds.sync.members import Members
from lordo_ds.sync.outer_sync import OuterSync

logger = logging.getLogger("lordo_ds")

# A sync that fails so often among the same replicas does not fail because one of them went away.
_MOST_FAILURES = 3


class Manager(Protocol):
    """What is used of `torchft.Manager`, made with `use_async_quorum=False`."""

    def register_state_dict_fn(
        self, key: str, load_state_dict: Callable[[Any], None], state_dict: Callable[[], Any]
    ) -> None: ...

    def start_quorum(self) -> None: ...

    def errored(self) -> Any: ...

    def report_error(self, e: Exception) -> None: ...

    def should_commit(self) -> bool: ...


class QuorumWire(ReplicaWire):
    """The replica group of the present quorum; `group` is the torchft process group that the manager reconfigures."""

    steps_alike = False

    def __init__(self, group: Any) -> None:
        super().__init__(None)
        self._quorum = group
        self._staged = "nccl" in group.getBackendName()

    def take_quorum(self) -> bool:
        """After a quorum was formed: who this replica is among how many. Whether that has changed."""
        before = self.index, self.size
        self.index, self.size = self._quorum.rank(), self._quorum.size()
        self.replicas = self.size
        return before != (self.index, self.size)

    def _all_reduce(self, tensor: Tensor, operation: Any) -> None:
        options = AllreduceOptions()
        options.reduceOp = operation
        self._quorum.allreduce([tensor], options).wait()

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        options = BroadcastOptions()
        options.rootRank = source
        self._quorum.broadcast([tensor], options).wait()

    def _all_gather(self, row: Tensor) -> Tensor:
        rows = [torch.empty_like(row) for _ in range(self.size)]
        self._quorum.allgather([rows], [row], AllgatherOptions()).wait()
        return torch.stack(rows)

    def _all_to_all(self, outgoing: Tensor, leaving: Sequence[int], arriving: Sequence[int]) -> Tensor:
        incoming = outgoing.new_empty(sum(arriving))
        self._quorum.alltoall_base(incoming, outgoing, list(arriving), list(leaving), AllToAllOptions()).wait()
        return incoming


class Membership(Members):
    """Puts whatever crosses replicas under a quorum: formed before, committed or undone after."""

    changing = True
    why_left_out = "not finite, or had just joined,"

    def __init__(self, optimizer: LoRDO, manager: Manager, wire: QuorumWire, start: Start) -> None:
        self.optimizer, self.manager, self.wire, self._start = optimizer, manager, wire, start
        self._healed = False
        manager.register_state_dict_fn("lordo_ds", self._heal, self.state)

    @property
    def step(self) -> int:
        """Attempted steps of the run that this replica is in: its data position."""
        return self.optimizer.attempted_steps

    def join(self) -> bool:
        """Take over what the others have, and be in step with them. Waits for their next sync.

        Returns:
            Whether the weights changed.
        """
        return self._in_quorum(self._catch_up)

    def _catch_up(self) -> bool:
        """The rest of the step that the others are ending."""
        if self.optimizer.attempted_steps:
            self.optimizer.cross_replicas()
        return self._healed

    # -- what LoRDO asks -----------------------------------------------------------------------------

    def around(self, cross: Callable[[], bool], final: bool = False) -> bool:
        """A quorum around whatever crosses replicas; none where nothing does."""
        optimizer = self.optimizer
        plan = sync_plan(optimizer.config, optimizer.attempted_steps)
        if not (final or plan.due or self._sync.bases.wait_for_all_replicas(optimizer.attempted_steps)):
            return cross()
        return self._in_quorum(cross)

    def least(self, config: LordoConfig, replicas: int) -> int:
        """How many replicas a sync needs is the manager's to say: those that join contribute nothing."""
        return 1

    # -- the quorum ----------------------------------------------------------------------------------

    def _in_quorum(self, run: Callable[[], bool]) -> bool:
        """Form a quorum and run; whatever breaks because a replica went away is undone and run by the rest."""
        changed, healed, failures = False, False, 0
        while True:
            self._healed = False
            self.manager.start_quorum()
            failures = 0 if self._take_quorum() else failures
            healed |= self._healed
            if healed and self.optimizer.attempted_steps:  # also where a failure undid the sync that it joined in
                self._sync.faults.doubtful = True
            before, undo = self.state(), _Undo(self._sync)
            try:
                if self.manager.errored() is None:
                    changed = run() or changed
            except RuntimeError as error:
                failures += 1
                if isinstance(error, SyncError) or failures == _MOST_FAILURES:
                    raise
                logger.warning("LoRDO: a sync failed and is done again: %s", str(error).partition("\n")[0])
                self.manager.report_error(error)
            if self.manager.should_commit():
                return changed or healed
            self._load(before)
            undo.restore()

    def _take_quorum(self) -> bool:
        """Whether the replicas are not those of the quorum before."""
        if not self.wire.take_quorum():
            return False
        logger.warning("LoRDO: %d replicas from step %d on", self.wire.replicas, self.optimizer.attempted_steps)
        self._sync.faults.count_anew()  # replicas are numbered anew
        self._sync.share_out()
        if self._sync.bases.at_owners and not self.optimizer.config.outer.is_plain_average:
            logger.warning("LoRDO: others own what they did before: the outer momentum of it starts again")
        return True

    @property
    def _sync(self) -> OuterSync:
        assert self.optimizer.sync is not None
        return self.optimizer.sync

    # -- what a replica that joins takes over ---------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Copies of all that a sync may change, and so of all that a replica needs to take part in one."""
        optimizer, sync = self.optimizer, self._sync
        return {
            "start": self._start.texts(),
            "items": {item.plan.name: {"weight": item.weight.clone(), **_copied(item.state)} for item in sync.items},
            "counters": {name: getattr(sync, name) for name in SYNC_COUNTERS},
            "steps": [optimizer.attempted_steps, optimizer.executed_steps],
        }

    def _heal(self, state: dict[str, Any]) -> None:
        require_like(state.get("start"), self._start)
        self._load(state, besides=(*OWNED, *WIRE_ERRORS))  # which are that replica's, and of what it owns
        self._healed = True
        self.optimizer.forget_attempt()  # gradients of weights that are no more, rows of steps that it has not made
        logger.warning("LoRDO: took over the state of a live replica at step %d", self.optimizer.attempted_steps)

    @torch.no_grad()
    def _load(self, state: dict[str, Any], besides: Sequence[str] = ()) -> None:
        optimizer, sync = self.optimizer, self._sync
        for item in sync.items:
            saved = state["items"][item.plan.name]
            item.weight.copy_(saved["weight"])
            for key, value in saved.items():
                if key in besides:
                    item.state[key].zero_()
                elif isinstance(value, Tensor) and key != "weight":
                    item.state[key].copy_(value)
                elif key != "weight":
                    item.state[key] = value
        for name in SYNC_COUNTERS:
            setattr(sync, name, state["counters"][name])
        optimizer.attempted_steps, optimizer.executed_steps = state["steps"]
        sync.bases.look_again()


class _Undo:
    """What else a sync uses up, of this replica alone: it has to be there again when the sync is done again."""

    def __init__(self, sync: OuterSync) -> None:
        self.sync = sync
        self.waiting = [item.waiting.copy() for item in sync.items]
        self.rows, self.faults = sync.rows.mark(), sync.faults.mark()

    def restore(self) -> None:
        for item, waiting in zip(self.sync.items, self.waiting, strict=True):
            item.waiting = waiting
        self.sync.rows.return_to(self.rows)
        self.sync.faults.return_to(self.faults)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def join_replicas(trained: Any, manager: Manager, group: Any) -> Membership:
    """Let torchft run the cross-replica group of a job that is one replica. Returns at the others' next sync.

    Args:
        trained: a DeepSpeed engine with LoRDO, or a LoRDO optimizer used alone; one rank.
        manager: a `torchft.Manager` with `use_async_quorum=False`.
        group: the torchft process group that the manager was made with.

    Raises:
        ValueError: no LoRDO, more than one rank, or streaming.
        ConfigError: the replicas that are there were started differently; they go on without this one.
    """
    engine = hook(trained)
    optimizer = trained if engine is None else engine.optimizer
    if not isinstance(optimizer, LoRDO):
        raise ValueError(f"LoRDO: join_replicas() got a {type(trained).__name__}: give a LoRDO engine or optimizer")
    if optimizer.config.streaming.is_on:
        raise ValueError(
            "LoRDO: streaming syncs fragments among replicas that stay, and with torchft they come and go: leave "
            f"{optimizer.config.key('streaming')} out, or torchft off"
        )
    if optimizer.sync is None:
        optimizer._attach_alone()
    sync = optimizer.sync
    assert sync is not None
    ranks = sync.wire.replicas * sync.inside.everyone.size
    if ranks > 1:
        raise ValueError(
            f"LoRDO: torchft runs replicas of one rank, each a job of its own, and this job has {ranks}: start every "
            "replica with one process, or leave torchft off"
        )
    wire = QuorumWire(group)
    more = {} if engine is None else engine.setting_texts()
    membership = Membership(optimizer, manager, wire, start_of_replica(optimizer.config, sync.items, more))
    sync.use_wire(wire, membership)
    executed = optimizer.executed_steps
    joined = membership.join()
    sync.outside.record()
    if joined and engine is not None:
        engine.take_over(optimizer.executed_steps - executed)
    return membership
