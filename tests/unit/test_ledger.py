"""Bytes are what one rank sends, by kind."""

from __future__ import annotations

from lordo_ds.comm.ledger import ByteLedger, data_parallel_bytes, gather_bytes, reduction_bytes


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
