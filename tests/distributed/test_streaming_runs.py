"""What a run with streaming sends, reports, saves and refuses."""

from __future__ import annotations

import copy
import logging
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lordo_ds
from lordo_ds import LoRDO
from lordo_ds.core.schedule import sync_plan
from lordo_ds.errors import CheckpointError, ConfigError, SyncError
from lordo_ds.sync.bucket import BucketSync
from tests import problems
from tests.cases import Found, once, run_cases

pytestmark = pytest.mark.distributed

BASE: dict[str, Any] = {"lr": 1e-2, "rank": 3, "sync_interval": 9, "streaming": {"fragments": 3, "delay_steps": 2}}


def made(**settings: Any) -> tuple[list[tuple[str, torch.nn.Parameter]], LoRDO]:
    torch.set_num_threads(1)
    logging.getLogger("lordo_ds").setLevel(logging.CRITICAL)
    named = [(name, torch.nn.Parameter(w)) for name, w in problems.initial_weights(torch.float32).items()]
    return named, LoRDO(named, **{**BASE, **settings})


def train(named: list[tuple[str, torch.nn.Parameter]], optimizer: LoRDO, first: int, last: int) -> None:
    replica = dist.get_rank() // (
        optimizer.config.replica_size if isinstance(optimizer.config.replica_size, int) else 1
    )
    for step in range(first, last + 1):
        for name, gradient in problems.gradients(step, replica, torch.float32).items():
            dict(named)[name].grad = gradient
        optimizer.step()


def weights_of(named: list[tuple[str, torch.nn.Parameter]]) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in named])


# -- what is sent and told ---------------------------------------------------------------------------


def sent(wire: Any, replica_size: int, delay: int) -> dict[str, Any]:
    """Two rounds; a row of two numbers is recorded after every step."""
    streaming = {"fragments": 3, "delay_steps": delay}
    named, optimizer = made(pseudo_gradient_dtype=wire, replica_size=replica_size, streaming=streaming)
    found: dict[str, Any] = {"bytes": [], "fragments": [], "flights": [], "rows": []}
    predicted, rows = {}, 0
    for step in range(1, 21):
        train(named, optimizer, step, step)
        sync, plan = optimizer.sync, sync_plan(optimizer.config, step)
        assert sync is not None
        if plan.due:
            predicted[step] = sync.predicted_bytes(plan, rows, 2)
            rows = 0
        status = lordo_ds.status(optimizer)
        found["flights"].append(status["fragment_in_flight"])
        report = optimizer.last_report
        if optimizer.synced:
            assert report is not None and report.step == step - delay and report.participants == report.replicas
            found["bytes"].append((report.bytes_sent, predicted[report.step]))
            found["fragments"].append(report.fragment)
            assert 0 <= report.seconds_blocked <= report.seconds + 1e-3 or delay
        sync.rows.add([float(step), float(dist.get_rank())])
        rows += 1
        found["rows"] += sync.rows.take()
    found["total"] = sync.wire.ledger.total_bytes
    found["inside"] = lordo_ds.status(optimizer)["bytes_inside"]
    found["blocked"] = status["seconds_blocked_total"]
    return found


WIRES: dict[str, Any] = {"fp32": "fp32", "int8": "int8"}


@once
def runs() -> Found[Any]:
    cases = {(w, size, d): (WIRES[w], size, d) for w in WIRES for size in (1, 2) for d in (0, 2)}
    return run_cases(sent, 4, cases)


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("wire", WIRES)
def test_bytes_of_every_fragment_are_as_predicted(wire: str, size: int, delay: int) -> None:
    for run in runs()[wire, size, delay]:
        assert len(run["bytes"]) >= 6 and all(one == other > 0 for one, other in run["bytes"]), run["bytes"]
        assert run["fragments"][:6] == [0, 1, 2, 0, 1, 2]
        assert run["blocked"] > 0


@pytest.mark.parametrize("wire", WIRES)
def test_a_delay_sends_what_no_delay_sends(wire: str) -> None:
    for late, at_once in zip(runs()[wire, 2, 2], runs()[wire, 2, 0], strict=True):
        assert late["total"] == at_once["total"] and late["inside"] == at_once["inside"]


def test_a_fragment_is_in_flight_from_its_step_until_it_lands() -> None:
    (run, *_) = runs()["fp32", 1, 2]
    # Fragments begin at 3, 6, 9 and land two steps later, before the next one begins.
    assert run["flights"][:12] == [None, None, 0, 0, None, 1, 1, None, 2, 2, None, 0]


def test_recorded_rows_come_once_and_in_their_order() -> None:
    for run in runs()["fp32", 1, 2]:
        steps = [row[0] for row in run["rows"]]
        assert steps == [float(step) for step in range(1, len(steps) + 1)] and len(steps) >= 14
        assert all(row[1] == 1.5 for row in run["rows"])


# -- saved, ended, refused ---------------------------------------------------------------------------


def resumed(streaming: dict[str, int], wire: str) -> dict[str, Any]:
    """Saved at step 13, when the fragment that began at 12 is in flight."""
    settings: dict[str, Any] = {"pseudo_gradient_dtype": wire, "streaming": streaming, "preset": "recommended"}
    named, optimizer = made(**settings)
    train(named, optimizer, 1, 13)
    refused = ""
    try:
        optimizer.state_dict()
    except CheckpointError as error:
        refused = str(error)
    drained = [optimizer.drain(), optimizer.drain()]
    saved = [p.detach().clone() for _, p in named], copy.deepcopy(optimizer.state_dict())
    train(named, optimizer, 14, 24)
    again, fresh = made(**settings)
    with torch.no_grad():
        for (_, parameter), weight in zip(again, saved[0], strict=True):
            parameter.copy_(weight)
    fresh.load_state_dict(saved[1])
    train(again, fresh, 14, 24)
    never, other = made(**settings)
    train(never, other, 1, 24)
    return {
        "refused": refused,
        "drained": drained,
        "resumed": torch.equal(weights_of(named), weights_of(again)),
        "undisturbed": torch.equal(weights_of(named), weights_of(never)),
    }


def resumed_in_other_fragments() -> list[bool]:
    """What was not told of the means is of elements that others own in other fragments."""
    named, optimizer = made(pseudo_gradient_dtype="int8", streaming={"fragments": 3})
    train(named, optimizer, 1, 10)
    again, fresh = made(pseudo_gradient_dtype="int8", streaming={"fragments": 2, "delay_steps": 1})
    with torch.no_grad():
        for (_, parameter), (_, weight) in zip(again, named, strict=True):
            parameter.copy_(weight)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.sync is not None and fresh.sync is not None
    found = []
    for item, other in zip(fresh.sync.items, optimizer.sync.items, strict=True):
        same = item.owned == other.owned
        kept = torch.equal(item.state["owner_error"], other.state["owner_error"]) if same else False
        found.append(kept if same else not bool(item.state["owner_error"].any()))
        found.append(torch.equal(item.state["wire_error"], other.state["wire_error"]))
    assert any(item.owned != other.owned for item, other in zip(fresh.sync.items, optimizer.sync.items, strict=True))
    train(again, fresh, 11, 20)
    return found


def beside_training() -> tuple[float, float]:
    """Seconds that a sync took, and that training waited for it; both sleep, the sync once and every step."""
    named, optimizer = made()
    run = BucketSync.run_

    def slow(self: BucketSync, *args: Any) -> None:
        time.sleep(0.5)
        run(self, *args)

    BucketSync.run_ = slow  # type: ignore[method-assign]
    try:
        for step in range(1, 6):
            time.sleep(0.3)
            train(named, optimizer, step, step)
    finally:
        BucketSync.run_ = run  # type: ignore[method-assign]
    assert optimizer.last_report is not None and optimizer.synced
    return optimizer.last_report.seconds, optimizer.last_report.seconds_blocked


def ended(delay: int) -> dict[str, Any]:
    """A final sync with a fragment in flight."""
    named, optimizer = made(streaming={"fragments": 3, "delay_steps": delay})
    train(named, optimizer, 1, 13)
    changed = [optimizer.final_sync(), optimizer.final_sync()]
    assert optimizer.sync is not None
    return {
        "changed": changed,
        "weights": weights_of(named),
        "syncs": optimizer.sync.syncs,
        "equal": optimizer.replicas_equal,
    }


def loaded_in_flight() -> dict[str, bool]:
    """Other weights, the same on all ranks, while a fragment is in flight; nothing moves them (lr 0) but syncs."""
    named, optimizer = made()
    train(named, optimizer, 1, 12)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with torch.no_grad():
        for _, parameter in named:
            parameter.copy_(torch.full_like(parameter, 5.0))
    train(named, optimizer, 13, 14)
    landed = optimizer.synced
    equal = bool((weights_of(named) == 5.0).all())
    train(named, optimizer, 15, 23)
    return {"landed": landed, "equal": equal, "later": bool(torch.allclose(weights_of(named), torch.tensor(5.0)))}


def swapped_in_flight() -> str:
    named, optimizer = made()
    train(named, optimizer, 1, 12)
    with torch.no_grad():
        named[0][1].mul_(2.0)
    try:
        optimizer.drain()
    except ConfigError as error:
        return str(error)
    return ""


def too_many_fragments() -> str:
    named, optimizer = made(streaming={"fragments": 8})
    try:
        train(named, optimizer, 1, 1)
    except ConfigError as error:
        return str(error)
    return ""


def stopped_by_faults() -> tuple[int, str]:
    """No replica is finite: what the background found ends the run where the fragment lands."""
    named, optimizer = made(max_nonfinite_syncs=1)
    train(named, optimizer, 1, 5)
    with torch.no_grad():
        named[0][1].fill_(float("nan"))
    for step in range(6, 12):
        try:
            train(named, optimizer, step, step)
        except SyncError as error:
            return step, str(error)
    return 0, ""


@once
def ends() -> Found[Any]:
    return run_cases(
        _call,
        2,
        {
            "resumed": (resumed, {"fragments": 3, "delay_steps": 2}, "fp32"),
            "resumed int8": (resumed, {"fragments": 1, "delay_steps": 8}, "int8"),
            "other fragments": (resumed_in_other_fragments,),
            "beside": (beside_training,),
            "ended": (ended, 2),
            "ended at once": (ended, 0),
            "loaded": (loaded_in_flight,),
            "swapped": (swapped_in_flight,),
            "too many": (too_many_fragments,),
            "faults": (stopped_by_faults,),
        },
    )


def _call(function: Any, *args: Any) -> Any:
    return function(*args)


@pytest.mark.parametrize("case", ["resumed", "resumed int8"])
def test_resuming_is_bitwise_the_run_that_drained_there(case: str) -> None:
    for found in ends()[case]:
        assert "call drain(), of the optimizer" in found["refused"]
        assert found["drained"] == [True, False] and found["resumed"] and not found["undisturbed"]


def test_training_goes_on_while_a_sync_is_in_flight() -> None:
    for seconds, blocked in ends()["beside"]:
        assert seconds >= 0.5 and blocked < seconds - 0.3, "two steps of 0.3 s lie between launch and landing"


def test_a_run_goes_on_in_other_fragments() -> None:
    assert all(all(found) for found in ends()["other fragments"])


@pytest.mark.parametrize(("case", "syncs"), [("ended", 5), ("ended at once", 5)])
def test_a_final_sync_ends_what_is_in_flight_and_leaves_the_replicas_equal(case: str, syncs: int) -> None:
    one, other = ends()[case]
    assert torch.equal(one["weights"], other["weights"])
    # The fragments at 3, 6, 9 and 12, and everything at the end; a second one finds the replicas equal.
    assert one["changed"] == [True, False] and one["syncs"] == syncs and one["equal"]


def test_weights_that_are_loaded_in_flight_are_not_moved_by_what_lands() -> None:
    assert ends()["loaded"] == [{"landed": True, "equal": True, "later": True}] * 2


def test_nothing_lands_on_weights_that_were_swapped_in() -> None:
    assert all("put them back first" in message for message in ends()["swapped"])


def test_more_fragments_than_layers_are_refused_when_the_run_begins() -> None:
    assert all("streaming.fragments = 8 must be at most 6" in message for message in ends()["too many"])


def test_what_a_sync_in_flight_finds_ends_the_run_where_it_lands() -> None:
    for step, message in ends()["faults"]:
        assert step == 8 and "no replica was finite" in message and "the last at step 6" in message
