"""The training script: what it leaves, what it says, and that nothing but the JSON decides what trains."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import free_port, run_ranks

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ROOT / "launchers"
SCRIPT = LAUNCHERS / "pretrain_gpt.py"
PARAMETERS = 2 * (4 * 32**2 + 3 * 32 * 64 + 2 * 32) + 32 + 512 * 32
STEPS, SYNC_INTERVAL, SAVED_AT = 14, 4, 6

pytestmark = [pytest.mark.deepspeed, pytest.mark.megatron, pytest.mark.timeout(240)]

MODEL = """
num_layers: 2
hidden_size: 32
num_attention_heads: 4
ffn_hidden_size: 64
seq_length: 32
vocab_size: 512
"""


def settings(optimizer: dict[str, Any], **others: Any) -> dict[str, Any]:
    """As the files in configs/ds/, but for a few steps of a very small model."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": optimizer,
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": STEPS, "warmup_num_steps": 2, "warmup_type": "linear"},
        },
        **others,
    }


def lordo(**params: Any) -> dict[str, Any]:
    defaults = {"lr": 0.01, "rank": 4, "sync_interval": SYNC_INTERVAL, "replica_size": 1}
    return {"type": "LoRDO", "params": {**defaults, **params}}


ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.0, "torch_adam": True}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model file and data; the cache is in it too."""
    home = tmp_path_factory.mktemp("pretrain")
    (home / "model.yaml").write_text(MODEL)
    words = [f"{stem}{ending}" for stem in ("weight", "anchor", "basis", "step") for ending in ("s", "ed", "ing", "")]
    generator = np.random.default_rng(0)
    with (home / "data.jsonl").open("w") as stream:
        for _ in range(120):
            # Each word is followed by one of three: context is worth more than frequency.
            chain = [int(generator.integers(len(words)))]
            for _ in range(60):
                chain.append((5 * chain[-1] + int(generator.integers(3))) % len(words))
            stream.write(json.dumps({"text": " ".join(words[i] for i in chain)}) + "\n")
    return home


def arguments(home: Path, config: dict[str, Any], output: str, *more: str) -> list[str]:
    path = home / f"{output}.json"
    path.write_text(json.dumps(config))
    given = {"--deepspeed_config": path, "--model": home / "model.yaml", "--data": home / "data.jsonl"}
    given["--output-dir"] = home / output
    return [*(str(word) for pair in given.items() for word in pair), "--eval-interval", "5", *more]


def run_script(home: str, argv: list[str]) -> None:
    """What `python launchers/pretrain_gpt.py` does, on one rank of `run_ranks`."""
    _enter(home, argv)
    import pretrain_gpt

    pretrain_gpt.main()


def mistake_of_one(home: str, argvs: list[list[str]]) -> str:
    """`mistake_of` the list that is this process's, alone."""
    argv = argvs[int(os.environ["RANK"])]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_PORT=str(free_port()))
    return mistake_of(home, argv)


def mistake_of(home: str, argv: list[str]) -> str:
    """The line that a user reads."""
    _enter(home, argv)
    import pretrain_gpt

    from pretrain.launch import one_line
    from pretrain.options import parse_arguments

    try:
        pretrain_gpt.set_up(parse_arguments("pretrain_gpt.py"))
    except ValueError as error:
        return one_line(error)
    return ""


def _enter(home: str, argv: list[str]) -> None:
    os.environ["LORDO_CACHE"] = str(Path(home) / "cache")
    sys.argv = ["pretrain_gpt.py", *argv]


def train(home: Path, config: dict[str, Any], output: str, *more: str, ranks: int = 2) -> list[dict[str, Any]]:
    """Run the script; give its metrics."""
    argv = arguments(home, config, output, *more)
    run_ranks(run_script, ranks, str(home), argv, init_process_group=False, timeout_s=90)
    return read_metrics(home / output)


def read_metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def lordo_run(home: Path) -> Path:
    """A run of the script under the deepspeed launcher, as users start it."""
    argv = arguments(home, settings(lordo()), "lordo", "--save-interval", str(SAVED_AT))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LORDO_CACHE": str(home / "cache"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port"]
    done = subprocess.run(
        [*launcher, str(free_port()), str(SCRIPT), *argv],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    (home / "lordo.out").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return home / "lordo"


def test_a_run_leaves_every_file_it_promises(lordo_run: Path) -> None:
    checkpoints = lordo_run / "checkpoints"
    assert (checkpoints / "latest").read_text().strip() == f"global_step{STEPS}"
    for step in (SAVED_AT, STEPS):
        for replica in (0, 1):
            assert list((checkpoints / f"global_step{step}" / f"replica_{replica}").glob("*model_states.pt"))
    assert (lordo_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((lordo_run / "tensorboard").glob("events.out.tfevents.*"))
    assert_events(lordo_run / "tensorboard", read_metrics(lordo_run))
    summary = json.loads((lordo_run / "summary.json").read_text())
    rows = read_metrics(lordo_run)
    assert summary["val_loss"] == rows[-1]["val_loss"]
    assert summary["bytes_replica"] == sum(row["bytes_replica"] for row in rows)
    assert summary["versions"]["deepspeed"] and "pretrain_gpt.py" in summary["command"]


def assert_events(folder: Path, rows: list[dict[str, Any]]) -> None:
    """What TensorBoard shows at each sync of bytes and blocked seconds is what the rows of the round add up to."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()

    def at_syncs(name: str) -> list[float]:
        return [event.value for event in events.Scalars(f"Train/LoRDO/{name}")]

    rounds = [rows[0:4], rows[4:8], rows[8:12], rows[12:]]
    for name, column in (("bytes_per_step", "bytes_replica"), ("seconds_blocked_per_step", "seconds_blocked")):
        expected = [sum(row[column] for row in some) / len(some) for some in rounds]
        assert at_syncs(name) == pytest.approx(expected, rel=1e-3), name
    assert at_syncs("adamw_ddp_bytes_per_step") == [4 * PARAMETERS] * 4
    assert at_syncs("diloco_bytes_per_step") == [PARAMETERS] * 4  # a sync every 4 steps
    assert all(PARAMETERS < value < 4 * PARAMETERS for value in at_syncs("low_rank_ddp_bytes_per_step"))


def test_metrics_have_a_row_for_every_step_and_bytes_only_at_syncs(lordo_run: Path) -> None:
    rows = read_metrics(lordo_run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in rows] == [step * 2 * 4 * 32 for step in range(1, STEPS + 1)]
    assert [row["step"] for row in rows if row["synced"]] == [4, 8, 12]
    # Row 1 holds start-up and first basis, the last row the final sync.
    assert [row["step"] for row in rows if row["bytes_replica"]] == [1, 4, 8, 12, STEPS]
    assert {row["bytes_ddp"] for row in rows} == {4 * PARAMETERS}  # fp32 gradients, 2 (N-1) / N = 1
    assert [row["step"] for row in rows if row["seconds_blocked"]] == [1, 4, 8, 12, STEPS]
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10, STEPS]
    assert all(math.isfinite(row[key]) for row in rows for key in ("loss", "grad_norm", "lr", "tokens_per_s"))


def test_the_progress_lines_tell_loss_speed_next_sync_bytes_and_time_blocked(home: Path, lordo_run: Path) -> None:
    out = (home / "lordo.out").read_text()
    line = rf"step 10/{STEPS} \| loss \d\.\d+ \| [\d,]+ tokens/s \| next sync in 2 \| sent .* MB, DDP .* MB \("
    found = re.search(line + r".*\) \| blocked ([\d,.]+) ms/step", out)
    assert found, out
    blocked = [row["seconds_blocked"] for row in read_metrics(lordo_run)]
    assert float(found[1].replace(",", "")) == pytest.approx(1e3 * sum(blocked[4:8]) / 4, abs=0.06), "of the last round"
    assert out.count("step 10/") == 1, "more than one rank speaks"
    assert re.search(r"validation perplexity \d+\.\d \(a unigram model: \d+\.\d\)", out)


@pytest.fixture(scope="module")
def adamw_rows(home: Path) -> list[dict[str, Any]]:
    return train(home, settings(ADAMW), "adamw", "--save-interval", str(SAVED_AT))


@pytest.mark.parametrize("optimizer", [lordo(), ADAMW], ids=["lordo", "adamw"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(
    home: Path, lordo_run: Path, adamw_rows: list[dict[str, Any]], optimizer: dict[str, Any]
) -> None:
    whole = home / ("adamw" if optimizer is ADAMW else "lordo")
    part = home / f"{whole.name}-resumed"
    shutil.copytree(whole, part)
    (part / "checkpoints" / "latest").write_text(f"global_step{SAVED_AT}")
    again = train(home, settings(optimizer), part.name, "--resume")
    expected = read_metrics(whole)
    for row in (*again, *expected):
        del row["tokens_per_s"], row["seconds_blocked"]
    assert again == expected


def test_a_run_that_is_saved_with_a_sync_in_flight_resumes_bit_by_bit(home: Path) -> None:
    """The sync that begins at step 4 would land at step 7; the save after step 6 lands it, and its rows and bytes.

    So does the save after step 12, which both runs make: a save is a step of the trajectory.
    """
    config, saves = settings(lordo(streaming={"delay_steps": 3})), ("--save-interval", str(SAVED_AT))
    expected = train(home, config, "streaming", *saves)
    part = home / "streaming-resumed"
    shutil.copytree(home / "streaming", part)
    (part / "checkpoints" / "latest").write_text(f"global_step{SAVED_AT}")
    again = train(home, config, part.name, *saves, "--resume")
    for row in (*again, *expected):
        del row["tokens_per_s"], row["seconds_blocked"]
    assert again == expected
    # Row 1 holds start-up and first basis; what the saves landed is in rows 6 and 12.
    assert [row["step"] for row in expected if row["bytes_replica"]] == [1, SAVED_AT, 11, 2 * SAVED_AT, STEPS]


def test_every_optimizer_starts_from_the_same_weights_on_the_same_data(
    lordo_run: Path, adamw_rows: list[dict[str, Any]]
) -> None:
    assert adamw_rows[0]["loss"] == read_metrics(lordo_run)[0]["loss"]
    assert all(row["bytes_replica"] == row["bytes_ddp"] == 4 * PARAMETERS and row["synced"] for row in adamw_rows)
    assert {row["seconds_blocked"] for row in adamw_rows} == {None}, "DeepSpeed's collectives are not timed"


def test_ranks_and_accumulation_divide_the_same_global_batch(home: Path, adamw_rows: list[dict[str, Any]]) -> None:
    changed = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    one_rank = train(home, settings(ADAMW, **changed), "accumulated", ranks=1)
    for key in ("loss", "grad_norm", "val_loss"):
        expected = [row[key] for row in adamw_rows if key in row]
        assert [row[key] for row in one_rank if key in row] == pytest.approx(expected, rel=1e-4)
    assert {row["bytes_ddp"] for row in one_rank} == {0}


TENSOR, PIPE = ("--tensor-parallel", "2"), ("--pipeline-parallel", "2")
ACCUMULATED = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}


def assert_same_run(found: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float) -> None:
    for key in ("loss", "grad_norm", "val_loss", "lr"):
        wanted = [row[key] for row in expected if key in row]
        assert [row[key] for row in found if key in row] == pytest.approx(wanted, rel=rel), key
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]


def elements(tensor: int, stages: list[str]) -> list[int]:
    """Of the parameters on each of two stages, or on the one, of a tensor-parallel rank."""
    norms, matrices = 2 * 32, (4 * 32**2 + 3 * 32 * 64) // tensor
    parts = {"embedding": 512 * 32 // tensor, "layer": norms + matrices, "norm": 32}
    return [sum(parts[part] for part in stage.split()) for stage in stages]


@pytest.mark.parametrize("shape", [(TENSOR, {}), (PIPE, ACCUMULATED)], ids=["tensor", "pipeline"])
def test_tensor_ranks_and_stages_train_adamw_as_one_rank_does(
    home: Path, adamw_rows: list[dict[str, Any]], shape: tuple[tuple[str, str], dict[str, int]]
) -> None:
    """Two data-parallel ranks of two ranks each; bytes are those of this rank's part and stage."""
    flags, keys = shape
    rows = train(home, settings(ADAMW, **keys), f"adamw {flags[0]}", *flags, ranks=4)
    assert_same_run(rows, adamw_rows, rel=1e-5)
    own = elements(2, ["embedding layer layer norm"]) if flags == TENSOR else elements(1, ["embedding layer"])
    assert {row["bytes_ddp"] for row in rows} == {4 * own[0]}
    assert rows[-1]["bytes_eval"] == adamw_rows[-1]["bytes_eval"]


def test_stages_of_tensor_ranks_train_adamw_as_one_rank_does_and_resume(
    home: Path, adamw_rows: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    keys = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    config = settings(ADAMW, **keys)
    rows = train(home, config, "adamw mesh", *TENSOR, *PIPE, "--save-interval", str(SAVED_AT), ranks=4)
    assert_same_run(rows, adamw_rows, rel=1e-5)
    assert f"{PARAMETERS:,} parameters, " in capfd.readouterr().out, "the model is counted once"
    part = home / "adamw mesh-resumed"
    shutil.copytree(home / "adamw mesh", part)
    (part / "checkpoints" / "latest").write_text(f"global_step{SAVED_AT}")
    again = train(home, config, part.name, *TENSOR, *PIPE, "--resume", ranks=4)
    for row in (*again, *rows):
        del row["tokens_per_s"], row["seconds_blocked"]
    assert again == rows
    argv = arguments(home, config, part.name, *TENSOR, "--resume", "--train-steps", "20")
    message = run_ranks(mistake_of, 2, str(home), argv, init_process_group=False, timeout_s=60)[0]
    assert re.search(r"was saved with --tensor-parallel 2 --pipeline-parallel 2, this run has 2 and 1", message)


@pytest.mark.parametrize("flags", [TENSOR, PIPE], ids=["tensor", "pipeline"])
def test_two_replicas_of_tensor_ranks_or_stages_train_lordo_as_two_of_one_rank(
    home: Path, lordo_run: Path, flags: tuple[str, str]
) -> None:
    rows, expected = train(home, settings(lordo()), f"lordo {flags[0]}", *flags, ranks=4), read_metrics(lordo_run)
    assert_same_run(rows, expected, rel=1e-3)
    assert [row["synced"] for row in rows] == [row["synced"] for row in expected]
    assert [bool(row["bytes_replica"]) for row in rows] == [bool(row["bytes_replica"]) for row in expected]
    assert sum(row["bytes_replica"] for row in rows) < sum(row["bytes_replica"] for row in expected)


def test_one_replica_of_stages_of_tensor_ranks_trains_lordo_as_one_rank_does(home: Path) -> None:
    one = train(home, settings(lordo()), "lordo one", ranks=1)
    keys = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    assert_same_run(train(home, settings(lordo(), **keys), "lordo mesh", *TENSOR, *PIPE, ranks=4), one, rel=1e-3)


def test_low_rank_ddp_is_one_replica_that_sends_what_ddp_sends(home: Path) -> None:
    params = {"qh_mode": "none", "basis_source": "gradient", "sync_interval": 1, "error_feedback": "fp32"}
    rows = train(home, settings(lordo(replica_size="all", **params)), "low_rank", "--train-steps", "5")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["bytes_replica"] == row["bytes_ddp"] for row in rows)


MISTAKES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "misspelt key": (settings(lordo(omgea=0.5)), [], r"omgea.*omega"),
    "omega": (settings(lordo(omega=1.5)), [], r"omega.*1\.5"),
    "rank": (settings(lordo(rank=0)), [], r"rank.*0"),
    "stage": (settings(lordo(), zero_optimization={"stage": 4}), [], r"stage Input should be 0, 1, 2, 3"),
    "batch": (settings(ADAMW, train_batch_size=7), [], r"DeepSpeed refuses the settings: .*train_batch_size"),
    "data": (settings(ADAMW), ["--data", "nowhere.txt"], r"nowhere\.txt: no such file"),
    "model": (settings(ADAMW), ["--model", "nowhere.yaml"], r"nowhere\.yaml: No such file"),
    "json": (settings(ADAMW), ["--deepspeed_config", "nowhere.json"], r"nowhere\.json: No such file"),
    "blocks": ({"optimizer": "AdamW"}, [], "must be a JSON object"),
    "tensor parallel": (
        settings(ADAMW),
        ["--tensor-parallel", "3"],
        r"--tensor-parallel 3: must divide num_attention_heads 4, .* \(nearest: 2\)",
    ),
    "no tensor parallel": (settings(ADAMW), ["--tensor-parallel", "0"], "--tensor-parallel 0: must be at least 1"),
    "pipeline": (
        settings(ADAMW),
        ["--pipeline-parallel", "4"],
        r"--pipeline-parallel 4: must be at most num_layers 2 \(nearest: 2\)",
    ),
    "ranks": (
        settings(ADAMW),
        ["--tensor-parallel", "2", "--pipeline-parallel", "2"],
        r"the number of ranks must be a multiple of 4, not 1 \(nearest: 4\)",
    ),
    "steps": (settings(ADAMW), ["--train-steps", "0"], "--train-steps 0: must be at least 1"),
    "option": (settings(ADAMW), ["--trian-steps", "5"], "unrecognized arguments: --trian-steps"),
    "resume": (settings(ADAMW), ["--resume"], "--resume: no checkpoint in .*leave --resume away"),
}


@pytest.fixture(scope="module")
def told(home: Path) -> dict[str, str]:
    """What the script says of each mistake."""
    argvs = [arguments(home, config, f"mistake {name}", *more) for name, (config, more, _) in MISTAKES.items()]
    said = run_ranks(mistake_of_one, len(argvs), str(home), argvs, init_process_group=False, timeout_s=120)
    return dict(zip(MISTAKES, said, strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_a_line(told: dict[str, str], name: str) -> None:
    assert re.search(MISTAKES[name][2], told[name]), told[name]


def test_a_mistake_is_one_line_on_stderr_a_failure_and_no_traceback(home: Path) -> None:
    done = run_alone(home, arguments(home, settings(lordo(omega=1.5)), "omega"))
    assert done.returncode == 2
    assert re.fullmatch(r"pretrain_gpt\.py: error: .*omega.*", done.stderr.strip().splitlines()[-1])
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


def run_alone(home: Path, argv: list[str]) -> subprocess.CompletedProcess[str]:
    """The script as one process, without a launcher."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "LORDO_CACHE": str(home / "cache"), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(SCRIPT), *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def rows_of(home: Path, output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / output / "metrics.jsonl").read_text().splitlines()]


def test_two_replicas_of_two_shards_at_stages_1_2_and_3_differ_in_nothing_but_the_json(home: Path) -> None:
    """The same samples per replica, on one rank or shared by two: the same losses and the same bytes saved."""
    single = settings(lordo(), train_micro_batch_size_per_gpu=4)
    run_ranks(run_script, 2, str(home), arguments(home, single, "two_by_one"), timeout_s=200, init_process_group=False)
    expected = rows_of(home, "two_by_one")
    for stage in (1, 2, 3):
        keys = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
        output = f"two_by_two_{stage}"
        run_ranks(
            run_script,
            4,
            str(home),
            arguments(home, settings(lordo(replica_size=2), **keys), output),
            timeout_s=200,
            init_process_group=False,
        )
        found = rows_of(home, output)
        assert [row["synced"] for row in found] == [row["synced"] for row in expected]
        for row, other in zip(found, expected, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4), f"stage {stage}, step {row['step']}"
        assert found[-1]["val_loss"] == pytest.approx(expected[-1]["val_loss"], rel=1e-4)
