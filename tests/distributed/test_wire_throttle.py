"""`wire_throttle`: a sync takes as long as on the link that it imitates; what travels is the same."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lordo_ds
from lordo_ds import LoRDO
from lordo_ds.comm.slow_link import SlowLink
from lordo_ds.core.schedule import sync_plan
from lordo_ds.watch.watchdog import Watchdog
from tests.cases import Found, once, run_cases
from tests.collectives import CollectiveCounter, Record
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS, INTERVAL = 5, 2
MBIT_PER_S, LATENCY_MS = 0.0625, 10.0
SETTINGS: dict[str, Any] = {"lr": 1e-2, "rank": 2, "sync_interval": INTERVAL, "preset": "recommended"}
HOPS = {"all_reduce": 2, "all_gather_into_tensor": 1, "broadcast": 1}  # between two replicas


def trained(replica_size: int, throttle: dict[str, float] | None) -> dict[str, Any]:
    """Of this rank: per step, the seconds it took and what left the replica; at the end weights and status."""
    weights = {"a": torch.randn(24, 16), "b": torch.randn(8, 30), "c": torch.randn(11)}
    named = [(name, nn.Parameter(value)) for name, value in weights.items()]
    optimizer = LoRDO(named, **SETTINGS, replica_size=replica_size, wire_throttle=throttle)
    seconds, crossing, statuses = [], [], []
    with CollectiveCounter() as counter:
        for step in range(1, STEPS + 1):
            for _, parameter in named:
                parameter.grad = torch.randn(parameter.shape, generator=_generator(step, replica_size))
            began = time.perf_counter()
            with counter.in_phase(f"step {step}"):
                optimizer.step()
            seconds.append(time.perf_counter() - began)
            crossing.append(counter.crossing(lambda rank: rank // replica_size, phase=f"step {step}"))
            statuses.append(lordo_ds.status(optimizer))
    plan = sync_plan(optimizer.config, INTERVAL)
    assert optimizer.sync is not None
    return {
        "seconds": seconds,
        "crossing": crossing,
        "status": statuses,
        "weights": [parameter.detach() for _, parameter in named],
        "predicted": optimizer.sync.predicted_bytes(plan, rows=0, row_length=0),
    }


def _generator(step: int, replica_size: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 * step + dist.get_rank() // replica_size)


THROTTLES = {"free": None, "held": {"mbit_per_s": MBIT_PER_S, "latency_ms": LATENCY_MS}}


@once
def runs(replica_size: int) -> Found[str]:
    cases = {case: (replica_size, throttle) for case, throttle in THROTTLES.items()}
    return run_cases(trained, 2 * replica_size, cases, timeout_s=90)


def modelled_s(records: list[Record]) -> float:
    """Worked out from what was handed to torch.distributed: between two replicas everything is sent once.

    What all ranks tell each other as objects, to start, is not sent through the wire.
    """
    sent = [record for record in records if record.op in HOPS]
    return sum(r.payload_bytes * 8 / (MBIT_PER_S * 1e6) + HOPS[r.op] * LATENCY_MS / 1e3 for r in sent)


@pytest.mark.parametrize("replica_size", [1, 2])
def test_a_sync_takes_as_long_as_on_such_a_link_and_a_step_between_two_is_not_held_back(replica_size: int) -> None:
    """Twins each send a part, and their links take a part of the time."""
    for held in runs(replica_size)["held"]:
        expected = [modelled_s(records) for records in held["crossing"]]
        assert [seconds > 0.1 for seconds in expected] == [True, True, False, True, False], expected
        for step, (seconds, took, status) in enumerate(zip(expected, held["seconds"], held["status"], strict=True), 1):
            blocked = status["last_step"]["seconds_blocked"]["replicas"]
            assert seconds <= sum(blocked.values()) <= took, f"step {step}"
            assert bool(blocked) == (seconds > 0), f"step {step}"
        freely = min(free["seconds"][step] for free in runs(replica_size)["free"] for step in (1, 3))
        assert freely < min(expected[1], expected[3]), "without a throttle"


@pytest.mark.parametrize("replica_size", [1, 2])
def test_what_travels_and_what_comes_of_it_are_the_same(replica_size: int) -> None:
    for free, held in zip(*runs(replica_size).values(), strict=True):
        for before, after in zip(free["status"], held["status"], strict=True):
            for key in ("bytes_sent", "bytes_sent_total", "bytes_inside", "bytes_per_step"):
                assert before[key] == after[key], key
            assert before["last_step"]["bytes"] == after["last_step"]["bytes"]
        assert held["status"][1]["last_sync"]["bytes_sent"] == held["predicted"] == free["predicted"]
        assert all(torch.equal(a, b) for a, b in zip(free["weights"], held["weights"], strict=True))


def test_status_tells_bytes_and_blocked_seconds_of_steps_rounds_and_other_methods() -> None:
    for rank in runs(1)["held"]:
        first, second, third, fourth, _ = rank["status"]
        sent = [sum(status["last_step"]["bytes"]["replicas"].values()) for status in rank["status"]]
        assert sent[2] == sent[4] == 0 and sent[0] == first["bytes_sent_total"]
        assert sent[0] + sent[1] == second["bytes_sent_total"] == third["bytes_sent_total"]
        assert second["bytes_per_step"] == third["bytes_per_step"] == second["bytes_sent_total"] / 2
        assert sent[3] == rank["predicted"] == 2 * fourth["bytes_per_step"]
        report = fourth["last_sync"]
        assert report["seconds_blocked"] <= report["seconds"]
        assert fourth["seconds_blocked_per_step"] == pytest.approx(report["seconds_blocked"] / 2)
        assert fourth["seconds_blocked_total"] == pytest.approx(sum(fourth["seconds_blocked"].values()))
        elements, coordinates = 24 * 16 + 8 * 30 + 11, 2 * (24 + 30) + 11
        assert fourth["other_methods_dtype"] == "float32"
        assert fourth["other_methods_bytes_per_step"] == {
            "adamw_ddp": 4 * elements, "low_rank_ddp": 4 * coordinates, "diloco": 4 * elements / INTERVAL,
        }  # fmt: skip


def one_slow_sum() -> tuple[float, str]:
    """Seconds that it took at the end of a step, and what the watchdog then thought of it."""
    optimizer = LoRDO([("a", nn.Parameter(torch.ones(4, 6)))], rank=2, sync_interval=2, sync_timeout_s=6.0)
    optimizer._attach_alone()
    assert optimizer.sync is not None
    wire = optimizer.sync.wire
    with optimizer.watchdog.at_the_end_of(1):
        wire.sum_(torch.zeros(10), "x")
    wire.slow_link = SlowLink(1000.0, latency_ms=1600.0)
    began = time.perf_counter()
    with optimizer.watchdog.at_the_end_of(2):
        wire.sum_(torch.zeros(10), "x")
    watchdog = optimizer.watchdog
    assert isinstance(watchdog, Watchdog)
    return time.perf_counter() - began, watchdog._heartbeat.verdict


def test_a_collective_on_a_slow_link_is_not_called_stuck_before_sync_timeout_s() -> None:
    """It takes longer than the watchdog waits for a rank that is gone, and shorter than for one that is stuck."""
    for seconds, verdict in run_ranks(one_slow_sum, 2, timeout_s=60):
        assert seconds >= 3.2 and not verdict
