"""Replicas that leave and join: against a manager in this process, and against torchft where it is installed."""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ReduceOp

from lordo_ds import ConfigError, LoRDO, LordoConfig
from lordo_ds.adapters.torchft import join_replicas
from lordo_ds.core.grouping import plan_parameters
from lordo_ds.core.reference import Reference
from tests import problems
from tests.ranks import _ensure_server, free_port, run_ranks

DTYPE = torch.float64
WIRES = ("fp32", "int8")
SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "rank": 2, "sync_interval": 3}
STEPS = 12


# -- a manager in this process: replicas are threads -----------------------------------------------------


class Done:
    def wait(self) -> None: ...


class PeerGoneError(RuntimeError):
    pass


@dataclass
class World:
    """Who is alive; quorums and collectives are rounds that end when all of `alive` have come."""

    alive: set[int]
    condition: threading.Condition = field(default_factory=threading.Condition)
    rounds: dict[str, dict[int, Any]] = field(default_factory=dict)
    dies_in_collective: dict[int, int] = field(default_factory=dict)
    """Replica -> at which of its collectives it goes away."""

    def meet(self, name: str, replica: int, value: Any, members: Callable[[], set[int]], fails: bool) -> dict[int, Any]:
        with self.condition:
            here = self.rounds.setdefault(name, {})
            here[replica] = value
            self.condition.notify_all()
            while not members() <= set(here):
                if fails and not members() <= self.alive:
                    raise PeerGoneError("gloo: Connection closed by peer")
                assert self.condition.wait(timeout=20), f"{name}: {sorted(here)} wait for {sorted(members())}"
            return dict(here)

    def leave(self, replica: int) -> None:
        with self.condition:
            self.alive.discard(replica)
            self.condition.notify_all()


class FakeManager:
    """The manager and the process group of one replica."""

    def __init__(self, world: World, replica: int, quorums: int = 0) -> None:
        self.world, self.replica = world, replica
        self.members: list[int] = []
        self.quorums, self.collectives, self.step = quorums, 0, 0
        self.error: Exception | None = None

    def getBackendName(self) -> str:
        return "torchft-gloo"

    def register_state_dict_fn(self, key: str, load: Callable[[Any], None], state: Callable[[], Any]) -> None:
        self.load, self.state = load, state

    def start_quorum(self) -> None:
        self.quorums, self.error = self.quorums + 1, None
        came = self.world.meet(f"quorum {self.quorums}", self.replica, self.step, lambda: self.world.alive, fails=False)
        self.members, most = sorted(came), max(came.values())
        # All start from the first one's weights, as with torchft's init_sync.
        donor = min(m for m in self.members if came[m] == most)
        given = self.state() if self.replica == donor else None
        try:
            states = self.meet("heal", given)
        except PeerGoneError as error:  # torchft keeps it to itself, too
            self.error = error
            return
        if self.step < most or (most == 0 and self.replica != donor):
            self.load(states[donor])
            self.step = most

    def meet(self, what: str, value: Any) -> dict[int, Any]:
        self.collectives += 1
        if self.world.dies_in_collective.get(self.replica) == self.collectives:
            self.world.leave(self.replica)
            raise SystemExit
        name = (
            f"{what} {self.quorums} {self.collectives - self.first_collective}"
            if what != "heal"
            else f"heal {self.quorums}"
        )
        if what == "heal":
            self.first_collective = self.collectives
        return self.world.meet(name, self.replica, value, lambda: set(self.members), fails=True)

    def errored(self) -> Exception | None:
        return self.error

    def report_error(self, e: Exception) -> None:
        self.error = e

    def should_commit(self) -> bool:
        self.step += self.error is None
        return self.error is None

    def rank(self) -> int:
        return self.members.index(self.replica)

    def size(self) -> int:
        return len(self.members)

    def allreduce(self, tensors: list[Tensor], options: Any) -> Done:
        values = self.meet("allreduce", tensors[0].clone())
        stacked = torch.stack([values[m] for m in self.members])
        tensors[0].copy_(stacked.sum(0) if options.reduceOp == ReduceOp.SUM else stacked.amax(0))
        return Done()

    def broadcast(self, tensors: list[Tensor], options: Any) -> Done:
        tensors[0].copy_(self.meet("broadcast", tensors[0].clone())[self.members[options.rootRank]])
        return Done()

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Done:
        values = self.meet("allgather", inputs[0].clone())
        for output, member in zip(outputs[0], self.members, strict=True):
            output.copy_(values[member])
        return Done()

    def alltoall_base(
        self, incoming: Tensor, outgoing: Tensor, arriving: list[int], leaving: list[int], options: Any
    ) -> Done:
        values = self.meet("alltoall", list(outgoing.clone().split(leaving)))
        incoming.copy_(torch.cat([values[member][self.rank()] for member in self.members]))
        return Done()


@dataclass
class Story:
    """What one replica's job saw: its weights after each step, and how many replicas there were."""

    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    participants: dict[int, int] = field(default_factory=dict)
    energies: dict[int, float | None] = field(default_factory=dict)  # captured_gradient_energy of every sync

    @property
    def end(self) -> dict[str, Tensor]:
        return self.weights[max(self.weights)]


def train(
    manager: Any,
    group: Any,
    replica: int,
    steps: int = STEPS,
    each_step: Callable[[int], None] = lambda step: None,
    finished: Callable[[Any], None] = lambda optimizer: None,
    **settings: Any,
) -> Story:
    """One replica's job."""
    named = [(name, torch.nn.Parameter(w)) for name, w in problems.initial_weights(DTYPE).items()]
    optimizer = LoRDO(named, **{**SETTINGS, **settings})
    membership = join_replicas(optimizer, manager, group)
    story = Story()
    while membership.step < steps:
        step = membership.step + 1
        each_step(step)
        for name, parameter in named:
            parameter.grad = problems.gradients(step, replica, DTYPE)[name]
        optimizer.step()
        assert optimizer.sync is not None
        optimizer.sync.rows.add([float(step)])
        story.weights[step] = {name: parameter.detach().clone() for name, parameter in named}
        story.sizes[step] = membership.wire.replicas
        if optimizer.synced and optimizer.last_report is not None:
            story.participants[step] = optimizer.last_report.participants
            story.energies[step] = optimizer.last_report.captured_gradient_energy
    finished(optimizer)
    return story


def in_threads(world: World, starts: dict[int, Callable[[], Any]]) -> dict[int, Any]:
    results: dict[int, Any] = {}
    errors: queue.Queue[BaseException] = queue.Queue()

    def run(replica: int) -> None:
        try:
            results[replica] = starts[replica]()
        except SystemExit:
            return
        except BaseException as error:
            errors.put(error)
            world.leave(replica)

    threads = [threading.Thread(target=run, args=(replica,)) for replica in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if not errors.empty():
        raise errors.get()
    return results


def start(world: World, replica: int, **given: Any) -> Callable[[], Any]:
    def begin() -> Any:
        manager = FakeManager(world, replica)
        return train(manager, manager, replica, **given)

    return begin


def by_reference(replicas: int, steps: int, **settings: Any) -> dict[str, Tensor]:
    config = LordoConfig.parse({**SETTINGS, **settings})
    weights = [problems.initial_weights(DTYPE) for _ in range(replicas)]
    reference = Reference(config, plan_parameters(config, problems.facts()), weights)
    for step in range(1, steps + 1):
        reference.step([problems.gradients(step, m, DTYPE) for m in range(replicas)])
    return weights[0]


def assert_all_equal(found: dict[int, Story]) -> None:
    first = next(iter(found.values())).end
    for story in found.values():
        assert all(torch.equal(story.end[name], first[name]) for name in first)


def test_where_the_owners_compute_the_momentum_of_one_that_dies_starts_again() -> None:
    owners = {"outer": {"momentum": 0.7, "compute": "owner"}}
    world = World({0, 1, 2}, dies_in_collective={2: 16})
    found = in_threads(world, {m: start(world, m, **owners) for m in range(3)})
    assert sorted(found) == [0, 1] and found[0].sizes[STEPS] == 2
    assert_all_equal(found)
    found = joined_at_6(dies_in_it=False, **owners)
    assert found[2].sizes[7] == 3
    world = World({0, 1, 2})
    found = in_threads(world, {m: start(world, m, **owners) for m in range(3)})
    for name, weight in by_reference(3, STEPS, outer={"momentum": 0.7}).items():
        torch.testing.assert_close(found[0].end[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wire", WIRES)
def test_under_a_quorum_of_all_the_trajectory_is_the_reference(wire: str) -> None:
    world = World({0, 1, 2})
    found = in_threads(world, {m: start(world, m, pseudo_gradient_dtype=wire) for m in range(3)})
    assert_all_equal(found)
    for name, weight in by_reference(3, STEPS, pseudo_gradient_dtype=wire).items():
        torch.testing.assert_close(found[0].end[name], weight, rtol=0, atol=1e-6)


def test_a_replica_that_joins_replaces_no_method_of_the_optimizer_or_of_its_sync() -> None:
    replaced: list[str] = []

    def look(optimizer: Any) -> None:
        for one in (optimizer, optimizer.sync, optimizer.sync.bases, optimizer.sync.faults):
            replaced.extend(name for name in vars(one) if callable(vars(type(one)).get(name)))

    world = World({0, 1})
    in_threads(world, {m: start(world, m, steps=3, finished=look) for m in range(2)})
    assert not replaced


def joined_at_6(dies_in_it: bool, **settings: Any) -> dict[int, Story]:
    """Replicas 0 and 1; replica 2 joins in the sync at step 6, in which replica 1 may die."""
    world = World({0, 1})
    managers = {m: FakeManager(world, m) for m in range(2)}
    late: list[threading.Thread] = []
    found: dict[int, Any] = {}

    def joins(step: int) -> None:
        if step == 5:  # between the syncs at 3 and 6
            with world.condition:
                world.alive.add(2)
            manager = FakeManager(world, 2, managers[0].quorums)
            late.append(threading.Thread(target=lambda: found.update({2: train(manager, manager, 2, **settings)})))
            late[0].start()
            if dies_in_it:
                world.dies_in_collective[1] = managers[1].collectives + 3

    found |= in_threads(
        world,
        {
            0: lambda: train(managers[0], managers[0], 0, each_step=joins, **settings),
            1: lambda: train(managers[1], managers[1], 1, **settings),
        },
    )
    late[0].join(30)
    assert_all_equal(found)
    return found


@pytest.mark.parametrize("wire", WIRES)
def test_a_replica_that_joins_heals_at_a_sync_and_counts_from_the_next(wire: str) -> None:
    found = joined_at_6(dies_in_it=False, pseudo_gradient_dtype=wire)
    assert min(found[2].weights) == 7 and found[2].sizes[7] == 3
    if wire != "fp32":  # three owners told what two had kept back
        return
    for name, weight in by_reference(2, 6).items():  # nothing of the newcomer's in the sync that it joined in
        torch.testing.assert_close(found[0].weights[6][name], weight, rtol=0, atol=1e-6)
    assert not torch.equal(found[0].end["tall"], by_reference(2, STEPS)["tall"])


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("collective", [2, 5, 8, 12, 16, 19, 20, 30])
def test_a_sync_that_a_replica_dies_in_is_undone_and_done_by_the_others(collective: int, wire: str) -> None:
    """Wherever it dies; both survivors end equal, with the steps of their own since the last sync kept."""
    world = World({0, 1, 2}, dies_in_collective={2: collective})
    found = in_threads(world, {m: start(world, m, pseudo_gradient_dtype=wire) for m in range(3)})
    assert sorted(found) == [0, 1]
    assert_all_equal(found)
    assert found[0].sizes[STEPS] == 2
    assert None not in found[0].energies.values(), "a sync that is done again has the last gradient's energy again"


@pytest.mark.parametrize("collective", [8, 12, 16, 20])
def test_numbers_recorded_before_a_sync_that_is_undone_are_averaged_once(collective: int) -> None:
    world = World({0, 1, 2}, dies_in_collective={2: collective})
    rows: dict[int, list[list[float]]] = {}

    def recorded(replica: int) -> Callable[[], Story]:
        manager = FakeManager(world, replica)
        return lambda: train(manager, manager, replica, finished=lambda o: rows.update({replica: o.sync.rows.take()}))

    in_threads(world, {m: recorded(m) for m in range(3)})
    for replica in (0, 1):
        steps = [row[0] for row in rows[replica]]
        assert steps == sorted(set(steps)) and len(steps) > STEPS - 4


def test_a_replica_that_joins_in_a_sync_that_is_undone_does_not_count_in_its_repetition() -> None:
    found = joined_at_6(dies_in_it=True)
    assert sorted(found) == [0, 2] and found[0].sizes[6] == 2
    assert found[0].participants[6] == 1, "the one that joined has contributed nothing yet"
    assert found[0].participants[9] == 2


def test_a_replica_that_was_started_differently_does_not_join_and_the_others_go_on() -> None:
    world, stories = World({0, 1, 2}), {}

    def with_word(replica: int, **settings: Any) -> Callable[[], str]:
        def begin() -> str:
            manager = FakeManager(world, replica)
            try:
                stories[replica] = train(manager, manager, replica, **settings)
            except ConfigError as error:
                world.leave(replica)
                return str(error)
            return ""

        return begin

    found = in_threads(world, {0: with_word(0), 1: with_word(1), 2: with_word(2, weight_decay=0.1)})
    assert "weight_decay is 0.1 here and 0.0 there" in found[2] and not found[0] + found[1]
    assert stories[0].sizes[STEPS] == 2
    assert_all_equal(stories)


def test_an_error_that_no_replica_is_to_blame_for_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    from lordo_ds.sync import part

    def fails(*_: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(part.PartSync, "_average_", fails)
    world = World({0, 1})
    with pytest.raises(RuntimeError, match="did not converge"):
        in_threads(world, {m: start(world, m) for m in range(2)})


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="give a LoRDO engine or optimizer"):
        join_replicas(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))]), None, None)  # type: ignore[arg-type]
    streaming = LoRDO([torch.nn.Parameter(torch.zeros(2, 2))], streaming={"delay_steps": 1})
    with pytest.raises(ValueError, match="leave streaming out, or torchft off"):
        join_replicas(streaming, None, None)  # type: ignore[arg-type]
    message = run_ranks(_refused_with_two_ranks, 2)[0]
    assert "this job has 2: start every replica with one process" in message


def _refused_with_two_ranks() -> str:
    named = [(name, torch.nn.Parameter(w)) for name, w in problems.initial_weights(DTYPE).items()]
    with pytest.raises(ValueError) as caught:
        join_replicas(LoRDO(named, **SETTINGS), None, None)  # type: ignore[arg-type]
    return str(caught.value)


# -- torchft itself ----------------------------------------------------------------------------------------


def train_engine(manager: Any, group: Any, replica: int, steps: int, each_step: Callable[[int], None]) -> Story:
    """As `train`, with a DeepSpeed engine in bf16 and a learning-rate schedule."""
    import torch.distributed as dist

    import lordo_ds
    from tests.engines import make_engine, settings, train_step, weights

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    lordo_ds.register()
    ramp = {"warmup_num_steps": 1000, "warmup_max_lr": 1e-2, "warmup_type": "linear"}
    engine = make_engine(
        settings("bf16", scheduler={"type": "WarmupLR", "params": ramp}, zero_optimization={"stage": 1})
    )
    membership = join_replicas(engine, manager, group)
    story = Story()
    while membership.step < steps:
        step = membership.step + 1
        each_step(step)
        train_step(engine, step, replica)
        story.weights[step] = {**weights(engine), "lr": torch.tensor(engine.get_lr()[0])}
        story.sizes[step] = membership.wire.replicas
        if step % 3 == 0:  # what the model computes with is what was synced
            model = torch.cat([p.detach().float().flatten() for p in engine.module.parameters()])
            stepped = torch.cat([weights(engine)[name].flatten() for name, _ in engine.module.named_parameters()])
            assert torch.equal(model, stepped.bfloat16().float())
    return story


def _replica_job(
    job: Callable[..., Story], replica: int, lighthouse: str, port: int, dies_at: int, results: Any
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    import torch.distributed as dist
    import torchft

    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    group = torchft.ProcessGroupGloo(timeout=timedelta(seconds=5))
    manager = torchft.Manager(
        pg=group, load_state_dict=None, state_dict=None, min_replica_size=1, use_async_quorum=False,
        timeout=timedelta(seconds=10), quorum_timeout=timedelta(seconds=60), rank=0, world_size=1,
        store_addr="127.0.0.1", store_port=port, lighthouse_addr=lighthouse, replica_id=f"replica_{replica}",
        hostname="127.0.0.1",
    )  # fmt: skip

    def each_step(step: int) -> None:
        time.sleep(0.1)
        if step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    story = io.BytesIO()
    torch.save(job(manager, group, replica, 120, each_step), story)
    results.put((replica, story.getvalue()))  # bytes: tensors would be fetched from this process, which may be gone
    time.sleep(1.0)
    manager.shutdown(wait=False)
    del store


@pytest.mark.distributed
@pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft is not installed: pip install torchft")
@pytest.mark.parametrize("trains", ["alone", "with an engine"])
def test_torchft_lets_a_replica_die_and_another_join_without_stopping_the_third(
    lives: dict[str, Future[dict[int, Story]]], trains: str
) -> None:
    found = lives[trains].result()
    assert sorted(found) == [0, 2]
    assert_all_equal(found)
    assert set(found[0].sizes.values()) == {2, 1}, "alone in between"
    assert min(found[2].sizes) > 20, "the one that joined went on where the other was"


@pytest.fixture(scope="module")
def lives() -> Iterator[dict[str, Future[dict[int, Story]]]]:
    """Both at once: most of their time is waiting."""
    _ensure_server()
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(one_dies_and_one_joins, job)
            for name, job in (("alone", train), ("with an engine", train_engine))
        }


def one_dies_and_one_joins(trains: Callable[..., Story]) -> dict[int, Story]:
    """Replicas 0 and 1 begin, 1 dies at step 20, and 2 joins; what the two that live to the end saw."""
    from torchft.coordination import LighthouseServer

    context = multiprocessing.get_context("forkserver")
    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=3000, heartbeat_timeout_ms=1500)
    address, results = lighthouse.address(), context.Queue()
    jobs: dict[int, Any] = {
        m: context.Process(target=_replica_job, args=(trains, m, address, free_port(), 20 if m == 1 else 0, results))
        for m in range(2)
    }
    for job in jobs.values():
        job.start()
    try:
        jobs[1].join(60)
        assert jobs[1].exitcode == -signal.SIGKILL
        time.sleep(3.0)  # the survivor goes on alone once the other's heartbeat has run out
        jobs[2] = context.Process(target=_replica_job, args=(trains, 2, address, free_port(), 0, results))
        jobs[2].start()
        stories = dict(results.get(timeout=90) for _ in range(2))
    finally:
        for job in jobs.values():
            job.kill()
        lighthouse.shutdown()
    return {m: torch.load(io.BytesIO(story), weights_only=False) for m, story in stories.items()}
