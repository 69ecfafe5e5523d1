"""A job that crashes comes back from its last checkpoint by itself, also with fewer replicas than it had."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
from tests.ranks import run_ranks  # noqa: E402
from trials.jobs import Job, metrics, write_settings  # noqa: E402

pytestmark = [pytest.mark.deepspeed, pytest.mark.megatron, pytest.mark.distributed, pytest.mark.timeout(280)]

STEPS, SAVED_EVERY = 40, 10
COMPARED = ("step", "loss", "lr", "grad_norm")


def script(folder: Path, name: str, *more: str) -> list[str]:
    options = write_settings(folder / "settings", {"sync_timeout_s": 10.0})
    output = ["--output-dir", str(folder / name), "--train-steps", str(STEPS), "--save-interval", str(SAVED_EVERY)]
    return [str(LAUNCHERS / "pretrain_gpt.py"), *options, *output, "--eval-interval", "0", *more]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in COMPARED} for row in metrics(folder)]


def wait_for_checkpoint(folder: Path, job: Job) -> None:
    until = time.monotonic() + 120
    while not (folder / "checkpoints" / "latest").exists():
        assert job.process.poll() is None and time.monotonic() < until, job.text()
        time.sleep(0.01)


def one_crash(folder: Path) -> str:
    """What a job says whose second rank is killed after its first checkpoint."""
    job = Job.start("torchrun --max-restarts=1", script(folder, "crashed"), folder / "crashed.log")
    wait_for_checkpoint(folder / "crashed", job)
    os.kill(job.rank_pids()[1], signal.SIGKILL)
    assert job.end(150) == 0, job.text()
    return job.text()


def one_node_lost(folder: Path) -> tuple[str, str]:
    """Two agents, as on two nodes, of which one and its rank are killed: what the other says, and what it said."""
    log = folder / "survivor.log"
    waits = "last_call_timeout=5,keep_alive_interval=2"
    node = f"torchrun --nnodes=1:2 --nproc-per-node=1 --max-restarts=3 --rdzv-id=two --rdzv-conf={waits}"
    port = 29400 + os.getpid() % 1000
    command = script(folder, "run", "--resume", "auto")
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    # The rendezvous is on the node that stays.
    survivor = Job.start(f"{node},is_host=1 --rdzv-endpoint=127.0.0.1:{port}", command, log, **own_store)
    lost = Job.start(f"{node},is_host=0 --rdzv-endpoint=127.0.0.1:{port}", command, folder / "lost.log", **own_store)
    try:
        wait_for_checkpoint(folder / "run", survivor)
        ranks = lost.rank_pids()
        lost.process.kill()
        for pid in ranks.values():
            os.kill(pid, signal.SIGKILL)
        assert survivor.end(200) == 0, survivor.text()
    finally:
        lost.end(0.0)
        survivor.end(0.0)
    return survivor.text(), lost.text()


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Future[str], Future[tuple[str, str]]]]:
    """Both jobs under launchers at once, for they wait a lot; and the folder that they are in."""
    folder = tmp_path_factory.mktemp("launched")
    with ThreadPoolExecutor(2) as pool:
        yield folder, pool.submit(one_crash, folder), pool.submit(one_node_lost, folder)


def test_torchrun_brings_a_crashed_job_back_from_its_last_checkpoint(
    launched: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody said --resume; every row is that of a run without a crash."""
    folder, crashed, _ = launched
    run_here(tmp_path, "whole", capsys=capsys)
    assert "resumed from step" in crashed.result()
    assert rows(folder / "crashed") == rows(tmp_path / "whole")


def _on_a_rank(argv: list[str]) -> int:
    """`python launchers/pretrain_gpt.py`, on a rank of `run_ranks`; its exit code."""
    sys.argv = argv
    import pretrain_gpt

    try:
        pretrain_gpt.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def run_here(*given: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """What rank 0 says in a run without a launcher."""
    assert run_ranks(_on_a_rank, 2, script(*given), init_process_group=False, timeout_s=120) == [0, 0]
    return "".join(line for line in capsys.readouterr().out.splitlines(True) if line.startswith("[rank 0]"))


def test_resume_auto_starts_anew_goes_on_or_has_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [
        run_here(tmp_path, "run", "--resume", "auto", "--train-steps", steps, capsys=capsys)
        for steps in ("12", "24", "24")
    ]
    assert "resumed" not in said[0] and "resumed from step 12" in said[1] and "nothing is left to do" in said[2]
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 25))


def saves(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir() if path.is_dir()}


def test_older_saves_than_asked_for_are_deleted_but_not_those_of_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = ("--keep-saves", "2")
    run_here(tmp_path, "run", "--train-steps", "12", *keep, capsys=capsys)
    assert saves(tmp_path / "run") == {"global_step10", "global_step12"}
    folder = tmp_path / "run" / "checkpoints"
    (folder / "global_step5").mkdir()
    for theirs in ("global_step5", "global_step10"):
        (folder / theirs / "notes.txt").write_text("mine")
    damaged = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines(True)
    damaged[8] = b"\0" * 100 + b"\n"  # as a crash may leave it
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"".join(damaged))
    said = run_here(tmp_path, "run", "--train-steps", "24", *keep, "--resume", capsys=capsys)
    assert "line 9 is damaged (zeros): of the 12 rows before the checkpoint those up to step 8 are kept" in said
    assert [row["step"] for row in rows(tmp_path / "run")] == [*range(1, 9), *range(13, 25)]
    for theirs in ("global_step5", "global_step10"):
        assert f"--keep-saves: not deleted: LoRDO: {folder / theirs}" in said
        shutil.rmtree(folder / theirs)
    assert saves(tmp_path / "run") == {"global_step20", "global_step24"}
    said = run_here(tmp_path, "run", "--train-steps", "34", "--keep-saves", "1", capsys=capsys)  # anew
    assert saves(tmp_path / "run") == {"global_step24", "global_step34"}
    assert "metrics.jsonl was an earlier run's: it is now metrics_of_earlier_run.jsonl" in said
    assert not (tmp_path / "run" / "in_use.lordo.json").exists()


def claim_output(folder: str) -> list[str]:
    from lordo_ds.adapters import shared_folder
    from pretrain.output_dir import claimed

    shared_folder.SEEN_WITHIN_S = 0.3
    os.environ["RANK"] = str(dist.get_rank())
    said = []
    for output in (f"{folder}/{{}}/run", f"{folder}/run"):
        with pytest.raises(ValueError) as caught, claimed(Path(output.format(f"node{dist.get_rank()}"))):
            pass
        said.append(str(caught.value))
    with claimed(Path(folder, "free")) as claim:
        assert (claim is None) == (dist.get_rank() > 0)
    with pytest.raises(KeyError), claimed(Path(folder, "free")):
        raise KeyError
    return said


def test_an_output_directory_is_shared_by_all_nodes_and_by_no_other_job(tmp_path: Path) -> None:
    from lordo_ds.checkpoint.claim import Claim

    (tmp_path / "run").mkdir()
    other = Claim.take(tmp_path / "run" / "in_use.lordo.json", "it")  # this process is the other job
    first, second = run_ranks(claim_output, 2, str(tmp_path))
    assert first == second
    assert "rank 1 (" in first[0] and f"{tmp_path}/node1/run) do not see what rank 0" in first[0]
    assert f"--output-dir {tmp_path}/run is in use by process {os.getpid()} on " in first[1]
    other.check()
    other.release()
    assert not list((tmp_path / "node0" / "run").iterdir()) and not list((tmp_path / "free").iterdir())


def test_a_new_run_in_an_old_directory_does_not_come_back_as_the_old_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(tmp_path, "run", "--train-steps", "12", capsys=capsys)
    assert "of an earlier run" in run_here(tmp_path, "run", "--train-steps", "4", capsys=capsys)
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "latest").read_text().strip() == "global_step4"
    assert (folder / "latest_of_earlier_run").read_text().strip() == "global_step12"


def test_the_job_goes_on_with_fewer_replicas_when_a_node_is_gone(launched: Any) -> None:
    folder, _, node_lost = launched
    survivor, lost = node_lost.result()
    assert "2 replica(s)" in survivor + lost and "1 replica(s)" in survivor
    assert "saved by 2 replica(s), 1 go on" in survivor, survivor
    assert rows(folder / "run")[-1]["step"] == STEPS
