"""A Hugging Face `Trainer` whose DeepSpeed JSON names LoRDO: it trains, saves every replica, and resumes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("hf_train.py")
RANKS = 2
# Both between syncs, where the replicas differ.
STEPS, SAVED_AT, SYNC_INTERVAL = 11, 5, 3

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.distributed,
    pytest.mark.hf,
]

# What the script may fill in: everything that LoRDO has in common with AdamW.
COMMON = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
ADAMW = {"type": "AdamW", "params": {**COMMON, "torch_adam": True}}


def lordo(replica_size: int) -> dict[str, Any]:
    own = {"rank": 4, "sync_interval": SYNC_INTERVAL, "replica_size": replica_size}
    return {"type": "LoRDO", "params": {**COMMON, **own}}


CASES = [(stage, replica_size) for stage in (1, 3) for replica_size in (1, 2)]
CONFIGS = {f"adamw-zero{stage}": (ADAMW, stage) for stage in (1, 3)}
CONFIGS |= {f"lordo-zero{stage}-by{size}": (lordo(size), stage) for stage, size in CASES}

each_case = pytest.mark.parametrize(("stage", "replica_size"), CASES)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the JSONs; each run leaves its output in a folder beside them."""
    home = tmp_path_factory.mktemp("hf")
    for name, (optimizer, stage) in CONFIGS.items():
        config = {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "optimizer": optimizer,
        }
        (home / f"{name}.json").write_text(json.dumps(config))
    return home


def run_each(calls: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Run the script with each list of arguments, one after the other; transformers is imported once."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import deepspeed

    import lordo_ds
    from tests.integration import hf_train

    found = {}
    for name, argv in calls.items():
        trainer = hf_train.main(argv)
        engine = trainer.model_wrapped
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        found[name] = {
            "weights": weights,
            "losses": logged(trainer.state.log_history, "loss"),
            "eval_losses": logged(trainer.state.log_history, "eval_loss"),
            "lrs": logged(trainer.state.log_history, "learning_rate"),
            "read": trainer.train_dataset.read,
            "status": lordo_ds.status(engine) if lordo_ds.hook(engine) else None,
        }
        del trainer, engine
        gc.collect()
    return found


def logged(history: list[dict[str, float]], key: str) -> dict[int, float]:
    return {int(row["step"]): row[key] for row in history if key in row}


Runs = dict[str, list[dict[str, Any]]]


def launch(home: Path, calls: dict[str, list[str]], suffix: str = "") -> Runs:
    """What each rank saw of each run, by the run's name."""
    full = {
        name: ["--deepspeed", str(home / f"{name}.json"), "--output_dir", str(home / f"{name}{suffix}"), *more]
        for name, more in calls.items()
    }
    ranks = run_ranks(run_each, RANKS, full, init_process_group=False, timeout_s=240)
    return {name: [rank[name] for rank in ranks] for name in full}


@pytest.fixture(scope="module")
def trained(home: Path) -> Runs:
    return launch(home, {name: [] for name in CONFIGS})


@pytest.fixture(scope="module")
def resumed(home: Path, trained: Runs) -> Runs:
    """In new processes, from the checkpoints of the runs above."""
    from_checkpoint = {
        name: ["--resume_from_checkpoint", str(home / name / f"checkpoint-{SAVED_AT}")]
        for name in CONFIGS
        if name.startswith("lordo")
    }
    return launch(home, from_checkpoint, "-resumed")


# -- training ----------------------------------------------------------------------------------------


@each_case
def test_the_loss_falls_from_where_adamw_starts(trained: Runs, stage: int, replica_size: int) -> None:
    losses = trained[f"lordo-zero{stage}-by{replica_size}"][0]["losses"]
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[1] == trained[f"adamw-zero{stage}"][0]["losses"][1]
    assert losses[STEPS] < losses[1] - 1.0
    evaluated = trained[f"lordo-zero{stage}-by{replica_size}"][0]["eval_losses"]
    assert evaluated[10] < evaluated[5] < losses[1]


@each_case
def test_replicas_and_shards_are_those_of_the_json(trained: Runs, stage: int, replica_size: int) -> None:
    runs = trained[f"lordo-zero{stage}-by{replica_size}"]
    first, second = (run["status"] for run in runs)
    replicas = RANKS // replica_size
    for status in (first, second):
        assert (status["replicas"], status["shard_size"]) == (replicas, replica_size)
        assert (status["step"], status["syncs"]) == (STEPS, STEPS // SYNC_INTERVAL)
        assert status["low_rank_parameters"] == 2 * 7
        assert bool(status["bytes_sent_total"]) == (replicas == 2)
    assert (first["replica_index"], second["replica_index"]) == (0, replicas - 1)
    differ = [name for name, weight in runs[0]["weights"].items() if not weight.equal(runs[1]["weights"][name])]
    assert bool(differ) == (replicas == 2)


@pytest.mark.parametrize("stage", [1, 3])
def test_moments_are_divided_by_the_shards(trained: Runs, stage: int) -> None:
    """Border rows are kept by both of their shards."""
    whole, *halves = (
        sum(size for kind, size in run["status"]["state_bytes"].items() if "exp_avg" in kind)
        for run in (trained[f"lordo-zero{stage}-by1"][0], *trained[f"lordo-zero{stage}-by2"])
    )
    assert whole <= sum(halves) < 1.01 * whole
    assert max(halves) < 0.51 * whole


@pytest.mark.parametrize("name", CONFIGS)
def test_each_process_reads_its_own_samples(trained: Runs, name: str) -> None:
    first, second = (run["read"] for run in trained[name])
    assert len(first) == len(second) >= STEPS * 4
    assert not set(first) & set(second)
    assert [first, second] == [run["read"] for run in trained["adamw-zero1"]]


# -- checkpoints -------------------------------------------------------------------------------------


@each_case
def test_every_replica_has_a_folder_inside_the_tag(home: Path, trained: Runs, stage: int, replica_size: int) -> None:
    checkpoint = home / f"lordo-zero{stage}-by{replica_size}" / f"checkpoint-{SAVED_AT}"
    tag = f"global_step{SAVED_AT}"
    assert (checkpoint / "latest").read_text() == tag
    folders = sorted((checkpoint / tag).glob("replica_*"))
    assert [folder.name for folder in folders] == [f"replica_{m}" for m in range(RANKS // replica_size)]
    for folder in folders:
        assert len(list(folder.glob("*_optim_states.pt"))) == replica_size
        assert list(folder.glob("*_model_states.pt"))


@each_case
def test_the_saved_model_has_the_weights_of_the_first_replica(
    home: Path, trained: Runs, stage: int, replica_size: int
) -> None:
    from safetensors.torch import load_file

    name = f"lordo-zero{stage}-by{replica_size}"
    saved = load_file(home / name / "model.safetensors")
    assert_equal(saved, trained[name][0]["weights"])


@each_case
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(
    trained: Runs, resumed: Runs, stage: int, replica_size: int
) -> None:
    name = f"lordo-zero{stage}-by{replica_size}"
    for whole, part in zip(trained[name], resumed[name], strict=True):
        assert_equal(part["weights"], whole["weights"])
        for key in ("losses", "eval_losses", "lrs"):
            assert part[key] == whole[key], key
        assert part["read"] and part["read"] == whole["read"][-len(part["read"]) :]
        assert len(part["read"]) < len(whole["read"])
        for key in ("step", "executed_steps", "syncs", "state_bytes", "next_sync_in"):
            assert part["status"][key] == whole["status"][key], key


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not found[name].equal(expected[name])] == []


# -- as users start it -------------------------------------------------------------------------------


def test_torchrun_trains_the_same_and_the_script_names_lordo_once(home: Path, trained: Runs) -> None:
    assert [line for line in SCRIPT.read_text().splitlines() if "lordo" in line.lower()] == [
        "import lordo_ds  # noqa: F401"
    ]
    name = "lordo-zero3-by1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
    arguments = ["--deepspeed", str(home / f"{name}.json"), "--output_dir", str(home / "torchrun")]
    done = subprocess.run(
        [*command, "--nproc_per_node", str(RANKS), str(SCRIPT), *arguments],
        cwd=home,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    state = json.loads((home / "torchrun" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert logged(state["log_history"], "loss") == trained[name][0]["losses"]
