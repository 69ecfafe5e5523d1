"""Bytes are what one rank sends, seconds what that blocked it for, by kind; and everything sent is entered."""

from __future__ import annotations

import ast
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lordo_ds.comm.ledger import Amounts, ByteLedger, data_parallel_bytes, gather_bytes, reduction_bytes
from lordo_ds.sync.traffic import Traffic, counted_by_axis

ROOT = Path(__file__).resolve().parents[2]


def test_a_reduction_sends_twice_the_payload_less_a_share() -> None:
    assert [reduction_bytes(1200, replicas) for replicas in (1, 2, 3, 4)] == [0, 1200, 1600, 1800]


def test_data_parallel_training_is_charged_what_crosses_replicas() -> None:
    assert data_parallel_bytes(800, replicas=4, replica_size=1) == reduction_bytes(800, 4)
    assert data_parallel_bytes(800, replicas=2, replica_size=8) == 100  # each of 8 ranks takes its part, once
    assert data_parallel_bytes(800, replicas=1, replica_size=4) == reduction_bytes(800, 4)


def test_a_gather_sends_the_payload_to_each_of_the_others() -> None:
    assert [gather_bytes(100, replicas) for replicas in (1, 2, 4)] == [0, 100, 300]


def test_bytes_add_up_by_kind_and_survive_saving() -> None:
    ledger = ByteLedger()
    for kind, sent in (("header", 8), ("exp_avg", 100), ("header", 8)):
        ledger.add(kind, sent)
    restored = ByteLedger()
    restored.load_state_dict(ledger.state_dict())
    restored.add("exp_avg", 1)
    assert (ledger.by_kind["header"], ledger.total_bytes, restored.total_bytes) == (16, 116, 117)
    assert ledger.state_dict() == {"header": 16, "exp_avg": 100}  # the copy counts on its own


def test_seconds_add_up_by_kind_and_stay_with_the_process() -> None:
    ledger = ByteLedger()
    for kind, sent, seconds in (("header", 8, 0.5), ("start", 0, 0.25), ("header", 8, 1.0)):
        ledger.add(kind, sent, seconds)
    assert ledger.seconds_by_kind == {"header": 1.5, "start": 0.25} and ledger.total_seconds == 1.75
    assert ledger.state_dict() == {"header": 16}, "what only came in was not sent, and a save has bytes alone"
    ledger.load_state_dict({"header": 100})
    assert (ledger.total_bytes, ledger.total_seconds) == (100, 1.75)


def test_threads_may_enter_what_they_send_at_once() -> None:
    ledger = ByteLedger()

    def enter(_: int) -> None:
        for _ in range(20_000):
            ledger.add("header", 1, 1.0)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(enter, range(4)))
    assert (ledger.total_bytes, ledger.total_seconds) == (80_000, 80_000.0)


# -- steps and rounds --------------------------------------------------------------------------------


def test_what_is_counted_belongs_to_the_step_that_ends_next_and_to_its_round() -> None:
    wire, shard, traffic = ByteLedger(), ByteLedger(), Traffic()

    def end(step: int, synced: bool) -> dict[str, Amounts]:
        traffic.end_step(step, synced, counted_by_axis({"replicas": [wire], "shard": [shard]}))
        return traffic.last_step

    assert (traffic.bytes_per_step, traffic.blocked_per_step_s) == (0.0, 0.0)
    wire.add("start", 100, 1.0)
    shard.add("basis", 7, 0.125)
    assert end(1, synced=False) == {"replicas": Amounts({"start": 100}, {"start": 1.0}),
                                    "shard": Amounts({"basis": 7}, {"basis": 0.125})}  # fmt: skip
    assert (traffic.bytes_per_step, traffic.blocked_per_step_s) == (100.0, 1.0), "of the steps so far"
    assert end(2, synced=False) == {"replicas": Amounts(), "shard": Amounts()}
    wire.add("header", 20, 2.0)
    assert end(3, synced=True)["replicas"] == Amounts({"header": 20}, {"header": 2.0})
    assert (traffic.bytes_per_step, traffic.blocked_per_step_s) == (40.0, 1.0)
    end(4, synced=False)
    assert traffic.bytes_per_step == 40.0, "the last round is the one that has ended"
    wire.add("header", 30, 4.0)
    assert end(5, synced=True)["replicas"].bytes == {"header": 30}
    assert (traffic.bytes_per_step, traffic.blocked_per_step_s) == (15.0, 2.0)


def test_a_final_sync_is_part_of_the_step_before_it() -> None:
    wire, traffic = ByteLedger(), Traffic()
    for step, sent in ((1, 10), (2, 20)):
        wire.add("header", sent)
        traffic.end_step(step, False, counted_by_axis({"replicas": [wire]}))
    wire.add("header", 40)
    for _ in range(2):  # asked for again, it syncs no more
        traffic.end_step(2, True, counted_by_axis({"replicas": [wire]}))
        assert traffic.last_step["replicas"].bytes == {"header": 60} and traffic.bytes_per_step == 35.0


def test_a_run_that_goes_on_counts_its_own_steps_only() -> None:
    wire = ByteLedger()
    wire.load_state_dict({"header": 1000})
    traffic = Traffic(40, counted_by_axis({"replicas": [wire]}))
    assert traffic.last_step["replicas"] == Amounts()
    wire.add("header", 6)
    traffic.end_step(41, True, counted_by_axis({"replicas": [wire]}))
    assert traffic.last_step["replicas"].bytes == {"header": 6} and traffic.bytes_per_step == 6.0


def test_a_group_that_serves_as_two_axes_is_counted_once() -> None:
    shared, other = ByteLedger(), ByteLedger()
    shared.add("flags", 8, 0.5)
    other.add("flags", 1, 0.25)
    counted = counted_by_axis({"twins": [shared, other], "everyone": [shared]})
    assert counted == {"twins": Amounts({"flags": 9}, {"flags": 0.75}), "everyone": Amounts()}


# -- one door ----------------------------------------------------------------------------------------

CARRIERS = {"_all_reduce", "_broadcast", "_all_gather", "_all_to_all"}  # what a subclass replaces
WITH_COMMS = ("lordo_ds/comm", "lordo_ds/adapters", "lordo_ds/sync", "lordo_ds/replica", "launchers/lab")


def sends_around_the_door(source: str, comms: set[str]) -> list[str]:
    """Calls in a `Comm` that send something, or enter it in the ledger, outside `with self._sending(...)`."""
    found = []

    def walk(node: ast.AST, method: str, inside: bool) -> None:
        if isinstance(node, ast.With):
            inside |= any(ast.unparse(item.context_expr).startswith("self._sending(") for item in node.items)
        if isinstance(node, ast.Call) and not inside:
            called = ast.unparse(node.func)
            carries = called.removeprefix("self.") in CARRIERS or called == "self.ledger.add"
            if carries or called.startswith(("dist.all_", "dist.broadcast", "dist.reduce", "dist.gather", "dist.send")):
                found.append(f"{method}: {called}")
        for child in ast.iter_child_nodes(node):
            walk(child, method, inside)

    for one in ast.walk(ast.parse(source)):
        if isinstance(one, ast.ClassDef) and one.name in comms:
            for method in one.body:
                if isinstance(method, ast.FunctionDef) and method.name not in {*CARRIERS, "_sending"}:
                    walk(method, f"{one.name}.{method.name}", inside=False)
    return found


def comm_classes(sources: list[str]) -> set[str]:
    """`Comm` and all that are made from it."""
    bases = {
        one.name: {ast.unparse(base).split(".")[-1] for base in one.bases}
        for source in sources
        for one in ast.walk(ast.parse(source))
        if isinstance(one, ast.ClassDef)
    }
    found = {"Comm"}
    while more := {name for name, of in bases.items() if of & found} - found:
        found |= more
    return found


def test_whatever_a_comm_sends_goes_through_one_door() -> None:
    sources = [path.read_text() for folder in WITH_COMMS for path in sorted((ROOT / folder).rglob("*.py"))]
    comms = comm_classes(sources)
    assert {"Comm", "InsideComm", "ReplicaWire", "QuorumWire", "VirtualWire"} <= comms
    assert [call for source in sources for call in sends_around_the_door(source, comms)] == []


@pytest.mark.parametrize("call", ["self._all_gather(row)", "dist.all_to_all_single(a, b)", "self.ledger.add('x', 1)"])
def test_a_send_around_the_door_is_found(call: str) -> None:
    source = f"class Comm:\n  def swap(self):\n    with self._sending('x', 1):\n      {call}\n    {call}\n"
    assert len(sends_around_the_door(source, {"Comm"})) == 1
