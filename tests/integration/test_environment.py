"""launchers/_env.sh: which environment is made, kept or made anew; and what .ci/run runs in it and answers.

Python, pip, the driver, ruff, mypy and pytest are played by scripts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Answers what _env.sh asks of an interpreter. Its torch is the word in the file `torch` beside the environment's bin:
# pip leaves one that is there, takes the CPU's where it is given constraints, and a GPU's otherwise.
PYTHON = """#!/bin/bash
torch="$(dirname "$0")/../torch"
case "$*" in
  "-m ruff"*|"-m mypy"*) [ -z "$FAILS" ] || [[ "$*" != *"$FAILS"* ]] || exit 1 ;;
  "-m pytest"*) echo "extras: $LORDO_EXTRAS"; echo "$CLOSING"; exit "$PYTEST_CODE" ;;
  *"-m venv"*) folder="${*: -1}"; rm -rf "$folder"; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
  *"pip install"*) echo "$*" >>"$CALLS"
    if [ ! -f "$torch" ]; then case "$*" in *" -c "*) echo cpu ;; *) echo "$NEW_TORCH" ;; esac >"$torch"; fi ;;
  *version.cuda*) grep -q gpu "$torch" ;;
  *cuda.is_available*) if [ "$(cat "$torch" 2>/dev/null)" = gpu ]; then echo /site; fi ;;
  *"import torch"*) [ -f "$torch" ] ;;
esac
"""
DRIVER = """#!/bin/bash
if [ "$1" = -L ]; then for i in $(seq "$GPUS"); do echo "GPU $i: fake"; done; else echo "CUDA Version: 13.0"; fi
"""


class Machine:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("launchers", "lordo_ds", "megatron_patches", ".ci"):
            (folder / name).mkdir()
        for name in ("launchers/_env.sh", "launchers/test.sh", ".ci/run", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder / name)
        (folder / "fake").mkdir()
        for name, text in (("python3.11", PYTHON), ("nvidia-smi", DRIVER)):
            (folder / "fake" / name).write_text(text)
            (folder / "fake" / name).chmod(0o755)

    def source(self, gpus: int, new_torch: str = "gpu", **environment: str) -> subprocess.CompletedProcess[str]:
        command = 'set -euo pipefail; source launchers/_env.sh; echo "$GPU_COUNT GPUs, ${DS_ACCELERATOR:-cuda}"'
        return self.run(["bash", "-c", command], GPUS=str(gpus), NEW_TORCH=new_torch, **environment)

    def ci(self, fails: str = "", code: int = 0, closing: str = "== 3 passed in 0.10s ==") -> tuple[int, list[str]]:
        """The exit code and the lines that CI sees."""
        done = self.run(
            ["bash", ".ci/run"], GPUS="0", NEW_TORCH="gpu", FAILS=fails, PYTEST_CODE=str(code), CLOSING=closing
        )
        return done.returncode, done.stdout.splitlines()

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        asked = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "LORDO_EXTRAS", "LORDO_VENV")  # by who runs the tests
        given = {name: value for name, value in os.environ.items() if name not in asked}
        given |= {"PATH": f"{self.folder / 'fake'}:{given['PATH']}", "CALLS": str(self.folder / "calls")}
        given |= {"PYTHON": str(self.folder / "fake" / "python3.11")}
        return subprocess.run(command, cwd=self.folder, env=given | environment, capture_output=True, text=True)

    @property
    def installs(self) -> int:
        calls = self.folder / "calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    @property
    def torch(self) -> str:
        return (self.folder / ".venv" / "torch").read_text().strip()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_an_environment_for_the_cpu_is_made_anew_where_there_are_gpus(machine: Machine) -> None:
    done = machine.source(gpus=0)
    assert done.returncode == 0 and "0 GPUs, cpu" in done.stdout and machine.torch == "cpu", done.stdout + done.stderr
    machine.source(gpus=0)
    assert machine.installs == 1
    done = machine.source(gpus=2)
    assert done.returncode == 0 and "made for the CPU" in done.stdout, done.stdout + done.stderr
    assert "2 GPUs, cuda" in done.stdout and machine.torch == "gpu" and machine.installs == 2


def test_an_environment_for_gpus_serves_machines_without(machine: Machine) -> None:
    machine.source(gpus=2)
    assert "0 GPUs, cpu" in machine.source(gpus=0).stdout and machine.installs == 1
    done = machine.source(gpus=0, LORDO_EXTRAS="megatron,train,test")  # more packages, but the same torch
    assert done.returncode == 0 and machine.installs == 2 and machine.torch == "gpu", done.stdout + done.stderr
    assert machine.source(gpus=2).returncode == 0 and machine.installs == 2


def test_a_torch_that_cannot_use_the_gpus_is_refused(machine: Machine) -> None:
    done = machine.source(gpus=2, new_torch="gpu of another driver")
    assert done.returncode == 1 and "cannot use them" in done.stderr and "DS_ACCELERATOR=cpu" in done.stderr
    assert machine.source(gpus=2, new_torch="gpu of another driver", DS_ACCELERATOR="cpu").returncode == 0


def test_an_environment_that_others_made_is_not_deleted(machine: Machine) -> None:
    machine.source(gpus=0)
    (machine.folder / ".venv" / "lordo.stamp").unlink()
    (machine.folder / ".venv" / "mine").touch()
    done = machine.source(gpus=2)
    assert done.returncode == 1 and "cannot use them" in done.stderr and (machine.folder / ".venv" / "mine").exists()


def test_a_directory_that_is_no_environment_is_not_cleared(machine: Machine) -> None:
    """`python -m venv --clear` would: an environment without pip, as uv makes them, or anything else in LORDO_VENV."""
    for _ in range(2):
        (machine.folder / "theirs").mkdir(exist_ok=True)
        (machine.folder / "theirs" / "mine").touch()
        done = machine.source(gpus=0, LORDO_VENV=str(machine.folder / "theirs"))
        assert done.returncode == 1 and "holds something else" in done.stderr, done.stdout + done.stderr
        assert (machine.folder / "theirs" / "mine").exists()
    (machine.folder / "theirs.lock").write_text("building")  # one that was cut short is made anew
    done = machine.source(gpus=0, LORDO_VENV=str(machine.folder / "theirs"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_hidden_gpus_do_not_count(machine: Machine) -> None:
    for visible, count in (("4,5", "2 GPUs, cuda"), ("", "0 GPUs, cpu"), ("0,1,2,3,4,5,6,7", "4 GPUs, cuda")):
        assert count in machine.source(gpus=4, CUDA_VISIBLE_DEVICES=visible).stdout
    assert "0 GPUs, cpu" in machine.source(gpus=4, DS_ACCELERATOR="cpu").stdout


def test_ci_runs_ruff_and_mypy_before_the_tests_and_ends_with_pytests_closing_line(machine: Machine) -> None:
    code, lines = machine.ci()
    assert (code, lines[-1]) == (0, "== 3 passed in 0.10s =="), lines
    assert [line for line in lines if line.startswith("[ci]")] == [
        "[ci] ruff check .", "[ci] ruff format --check .", "[ci] mypy",
    ]  # fmt: skip
    assert lines.index("[ci] mypy") < lines.index("extras: megatron,train,test,dev") and machine.installs == 1
    # What CI made serves who runs the tests, and who trains.
    for extras in ("megatron,train,test", "megatron,train"):
        assert machine.source(gpus=0, LORDO_EXTRAS=extras).returncode == 0 and machine.installs == 1


@pytest.mark.parametrize("fails", ["ruff check", "ruff format", "mypy"])
def test_ci_fails_where_ruff_or_mypy_do_and_still_runs_the_tests(machine: Machine, fails: str) -> None:
    code, lines = machine.ci(fails)
    assert code == 1 and lines[-1] == "== 3 passed in 0.10s ==" and lines[-2].startswith(f"failed: {fails}"), lines


def test_ci_answers_with_pytests_exit_code(machine: Machine) -> None:
    assert machine.ci(code=5, closing="no tests ran in 0.01s")[0] == 5
    code, lines = machine.ci("mypy", code=2, closing="1 error in 0.30s")
    assert code == 2 and lines[-2:] == ["failed: mypy", "1 error in 0.30s"]
    code, lines = machine.ci(code=0, closing="killed")
    assert code == 1 and "did not get to its closing line" in lines[-1]
