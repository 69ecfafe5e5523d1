"""The multi-process harness: what it returns, how it fails, and that it never leaves processes behind."""

import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.collectives import CollectiveCounter, Record
from tests.ranks import RankFailedError, run_ranks

pytestmark = pytest.mark.distributed


# ------------------------------------------------------------------------------------- run in the ranks


def sum_over_ranks(values: torch.Tensor, factor: int = 1) -> dict[str, object]:
    total = values * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return {"total": total * factor, "rank": dist.get_rank()}


def environment() -> dict[str, str | None]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR", "HARNESS_TEST")
    return {
        **{name: os.environ.get(name) for name in names},
        "threads": str(torch.get_num_threads()),
        "pid": str(os.getpid()),
    }


def random_draws() -> tuple[float, float]:
    return torch.rand(()).item(), float(np.random.rand())


def raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ZeroDivisionError("the real cause")
    dist.all_reduce(torch.ones(1))  # fails for the lost connection, after the real cause


def die_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def exit_silently_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def hang_on_rank_1(pid_folder: str) -> None:
    with open(f"{pid_folder}/{dist.get_rank()}", "w") as file:
        file.write(str(os.getpid()))
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.all_reduce(torch.ones(1))


def speak() -> None:
    print(f"rank {dist.get_rank()} speaks")
    sys.stderr.write("and complains\n")


def adopted_by_deepspeed() -> tuple[int, int, float]:
    import deepspeed
    from deepspeed import comm

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    start_s = time.monotonic()
    total = torch.ones(1)
    comm.all_reduce(total)
    assert time.monotonic() - start_s < 30, "DeepSpeed compiled something"
    return comm.get_rank(), comm.get_world_size(), total.item()


# ----------------------------------------------------------------------------------------------- claims


def test_results_come_back_in_rank_order_with_their_tensors() -> None:
    results = run_ranks(sum_over_ranks, 3, torch.arange(4.0), factor=2)
    assert [result["rank"] for result in results] == [0, 1, 2]
    for result in results:
        assert torch.equal(result["total"], torch.arange(4.0) * 12)


def test_each_rank_sees_its_place_and_the_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("first", "second"):  # the fork server lives on, its environment must not
        monkeypatch.setenv("HARNESS_TEST", value)
        results = run_ranks(environment, 2)
        for rank, seen in enumerate(results):
            assert seen["RANK"] == seen["LOCAL_RANK"] == str(rank)
            assert seen["WORLD_SIZE"] == seen["LOCAL_WORLD_SIZE"] == "2"
            assert seen["DS_ACCELERATOR"] == "cpu"
            assert seen["HARNESS_TEST"] == value
            assert seen["threads"] == "1"
        assert results[0]["pid"] != results[1]["pid"]


def test_ranks_start_from_the_same_random_state_every_time() -> None:
    first, second = run_ranks(random_draws, 2)
    assert first == second == run_ranks(random_draws, 1)[0]


def test_the_first_failure_is_the_one_reported_with_its_traceback() -> None:
    with pytest.raises(RankFailedError, match="the real cause") as caught:
        run_ranks(raise_on_rank_1, 2, timeout_s=60)
    assert caught.value.rank == 1
    assert caught.value.error_type == "ZeroDivisionError"
    assert str(caught.value).startswith("rank 1 raised")
    assert "in raise_on_rank_1" in str(caught.value)


def test_a_rank_that_dies_by_a_signal_is_named_before_its_victims() -> None:
    with pytest.raises(RankFailedError, match="rank 0 was ended by SIGKILL") as caught:
        run_ranks(die_on_rank_0, 2, timeout_s=60)
    assert caught.value.rank == 0
    assert caught.value.signal == signal.SIGKILL


def test_a_rank_that_exits_without_a_result_is_a_failure() -> None:
    with pytest.raises(RankFailedError, match="rank 1 exited with code 7") as caught:
        run_ranks(exit_silently_on_rank_1, 2, timeout_s=60)
    assert caught.value.rank == 1


def test_a_hang_ends_at_the_timeout_says_where_and_leaves_no_process(tmp_path) -> None:  # type: ignore[no-untyped-def]
    run_ranks(speak, 1)  # the fork server's start does not count
    start_s = time.monotonic()
    with pytest.raises(RankFailedError, match=r"did not finish within 3 s") as caught:
        run_ranks(hang_on_rank_1, 2, str(tmp_path), timeout_s=3)
    assert time.monotonic() - start_s < 20
    assert caught.value.timed_out
    assert "hang_on_rank_1" in str(caught.value)
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_the_ranks_output_is_shown_with_their_rank(capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(speak, 2)
    shown = capsys.readouterr().out
    for rank in range(2):
        assert f"[rank {rank}] rank {rank} speaks" in shown
        assert f"[rank {rank}] and complains" in shown


def test_a_local_function_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="module-level function"):
        run_ranks(lambda: None, 2)


@pytest.mark.slow
def test_spawned_ranks_give_the_same_results() -> None:
    forked, spawned = (
        run_ranks(sum_over_ranks, 2, torch.ones(2), start_method=method) for method in ("forkserver", "spawn")
    )
    assert torch.equal(forked[0]["total"], spawned[0]["total"])


@pytest.mark.deepspeed
def test_deepspeed_adopts_the_process_group_without_compiling() -> None:
    assert run_ranks(adopted_by_deepspeed, 2) == [(0, 2, 2.0), (1, 2, 2.0)]


# -------------------------------------------------------------------------------- the collective counter


def every_collective() -> list[Record]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair, peer = pairs[rank // 2], rank ^ 1
    four = torch.ones(4)
    with CollectiveCounter() as counter:
        counter.phase("inside")
        dist.all_reduce(torch.ones(8), group=pair)
        counter.phase("across")
        dist.all_gather([torch.empty(4) for _ in range(world_size)], four)
        dist.all_gather_into_tensor(torch.empty(4 * world_size), four)
        dist.reduce_scatter_tensor(torch.empty(4), torch.ones(4 * world_size))
        dist.reduce_scatter(torch.empty(4), [four] * world_size)
        dist.broadcast(four, src=0)
        dist.reduce(four, dst=0)
        dist.gather(four, [torch.empty(4) for _ in range(world_size)] if rank == 0 else None, dst=0)
        dist.scatter(torch.empty(4), [four] * world_size if rank == 0 else None, src=0)
        dist.all_to_all_single(torch.empty(4), four)
        dist.barrier()
        dist.all_gather_object([None] * world_size, "word")
        dist.broadcast_object_list([rank], src=0)
        counter.phase("pairwise")
        if rank < peer:
            dist.send(four, peer)
        else:
            dist.recv(four, peer)
        exchange = [dist.P2POp(dist.isend, four, peer), dist.P2POp(dist.irecv, torch.empty(4), peer)]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        with counter.in_phase("async"):
            dist.all_reduce(four, async_op=True).wait()
        dist.all_reduce(four, group=pair)
    dist.all_reduce(four)  # no longer counted
    return counter.records


def test_the_counter_sees_every_collective_with_its_group_bytes_and_phase() -> None:
    for rank, records in enumerate(run_ranks(every_collective, 4)):
        counter = CollectiveCounter()
        counter.records = records
        pair = (0, 1) if rank < 2 else (2, 3)
        everyone = (0, 1, 2, 3)

        (inside,) = counter.select(phase="inside")
        assert (inside.op, inside.ranks, inside.payload_bytes) == ("all_reduce", pair, 32)
        assert "test_harness.py" in inside.where
        assert inside.where.endswith("every_collective")

        across = {record.op: record for record in counter.select(phase="across")}
        assert all(record.ranks == everyone for record in across.values())
        assert {op: record.payload_bytes for op, record in across.items() if "object" not in op} == {
            "all_gather": 16,
            "all_gather_into_tensor": 16,
            "reduce_scatter_tensor": 64,
            "reduce_scatter": 64,
            "broadcast": 16,
            "reduce": 16,
            "gather": 16,
            "scatter": 64 if rank == 0 else 16,
            "all_to_all_single": 16,
            "barrier": 0,
        }
        assert across["all_gather_object"].payload_bytes > 0
        assert across["broadcast_object_list"].payload_bytes > 0

        pairwise = counter.select(phase="pairwise")
        assert {record.ranks for record in pairwise} == {pair}
        assert sorted(record.op for record in pairwise) == sorted(
            ["send" if rank % 2 == 0 else "recv", "isend", "irecv", "all_reduce"]
        )
        assert [record.op for record in counter.select(phase="async")] == ["all_reduce"]

        replica_of_rank = [0, 0, 1, 1]
        crossing = counter.crossing(replica_of_rank)
        assert {record.phase for record in crossing} == {"across", "async"}
        assert counter.crossing_bytes(replica_of_rank, phase="inside") == 0
        assert counter.crossing_bytes(replica_of_rank, phase="async") == 16
        assert counter.crossing(lambda rank: 0) == []


def collectives_of_a_deepspeed_step() -> list[Record]:
    import deepspeed
    from deepspeed import comm

    model = torch.nn.Linear(4, 4)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
        },
    )
    with CollectiveCounter() as counter:  # after DeepSpeed has captured the functions it calls
        counter.phase("step")
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        counter.phase("captured")
        comm.all_gather_into_tensor(torch.empty(8), torch.ones(4))
        comm.reduce_scatter_tensor(torch.empty(4), torch.ones(8))
    return counter.records


@pytest.mark.deepspeed
def test_the_counter_sees_what_deepspeed_sends_even_through_captured_functions() -> None:
    for records in run_ranks(collectives_of_a_deepspeed_step, 2):
        step = [record for record in records if record.phase == "step"]
        gradients = (4 * 4 + 4) * 4
        assert max(record.payload_bytes for record in step if record.op == "all_reduce") == gradients
        assert "all_gather_into_tensor" in {record.op for record in step}
        captured = [(record.op, record.payload_bytes) for record in records if record.phase == "captured"]
        assert captured == [("all_gather_into_tensor", 16), ("reduce_scatter_tensor", 32)]
