"""The experiment command: a grid run on two processes, resumed, reported, and one row run again."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
GRID = """
base:
  model: nano
  replicas: 2
  sequences: 4
  steps: 16
  lr_warmup: 2
  validation: 16
  settings: {rank: 4, sync_interval: 4}
lrs: [8.0e-3]
seeds: [0, 1]
methods:
  paper: {}
  adamw: {settings: {replica_size: all, low_rank: {exclude: [".*"]}, sync_interval: 1}}
claims:
  quality:
    title: Quality
    methods: [paper, adamw]
    report: {reference: adamw, diagnostics: true, panels: [{kind: frontier, x: bytes}, {kind: lr}]}
  ranks:
    methods: [paper]
    axes: {rank: [2, 4]}
    report: {panels: [{kind: lines, x: rank}, {kind: curve, y: overlap}]}
"""
ASKED_FOR = ("method", "seed", "lr", "val_loss", "bytes", "state_bytes", "tokens", "commit")

pytestmark = pytest.mark.timeout(240)


Done = subprocess.CompletedProcess[str]


def command(folder: Path, *options: str) -> list[str]:
    (folder / "grid.yaml").write_text(GRID)
    return [str(folder / "grid.yaml"), "--output", str(folder / "out"), "--device", "cpu", *options]


def _run_one(commands: list[list[str]]) -> Done:
    """`python launchers/experiment.py`, on a rank of its own."""
    import experiment

    from lab import tasks

    tasks.ITEMS = 60  # in place of a thousand of each task
    arguments = commands[int(os.environ["RANK"])]
    sys.argv = ["experiment.py", *arguments]
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as complained:
        try:
            code = experiment.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, code, said.getvalue(), complained.getvalue())


def run_all(*commands: list[str]) -> list[Done]:
    """All at once, in processes that have torch already."""
    done: list[Done] = run_ranks(_run_one, len(commands), list(commands), init_process_group=False, timeout_s=200)
    return done


def run(folder: Path, *options: str) -> Done:
    return run_all(command(folder, *options))[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    program = [sys.executable, str(ROOT / "launchers" / "experiment.py"), *command(folder, "--jobs", "2")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "out" / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_grid_becomes_one_csv(finished: Path) -> None:
    rows = rows_of(finished)
    # Three cells (rank 4 of `paper` is both claims'), two seeds.
    assert len(rows) == 6 and len({row["id"] for row in rows}) == 6
    for row in rows:
        assert all(row[column] for column in ASKED_FOR)
        assert int(row["tokens"]) == 16 * 4 * 16
    assert {row["claim"] for row in rows} == {"quality", "quality+ranks", "ranks"}
    by_method = {row["method"]: row for row in rows}
    assert int(by_method["paper"]["bytes"]) < int(by_method["adamw"]["bytes"]) == int(by_method["adamw"]["bytes_ddp"])
    assert json.loads(by_method["paper"]["config"])["settings"]["sync_interval"] == 4


def test_what_is_finished_is_not_run_again(finished: Path) -> None:
    before = (finished / "out" / "results.csv").read_bytes()
    done = run(finished)
    assert done.returncode == 0 and "0 runs in" in done.stdout and "; 0 left" in done.stdout
    assert (finished / "out" / "results.csv").read_bytes() == before


def test_a_row_can_be_run_again_with_the_same_numbers(finished: Path) -> None:
    row = next(row for row in rows_of(finished) if row["method"] == "paper")
    done = run(finished, "--rerun", row["id"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{float(row['val_loss'])!r} then, {float(row['val_loss'])!r} now" in done.stdout


def test_a_row_whose_numbers_were_changed_is_found_out(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    text = (finished / "out" / "results.csv").read_text()
    row = rows_of(finished)[0]
    (tmp_path / "out" / "results.csv").write_text(text.replace(row["val_loss"], "1.25"))
    done, nothing = run_all(command(tmp_path, "--rerun", row["id"]), command(tmp_path, "--rerun", "nothing"))
    assert done.returncode == 1 and "val_loss differs: 1.25 then" in done.stdout
    assert "no row 'nothing'" in nothing.stderr


def test_the_report_comes_from_the_csv_alone_and_keeps_the_text_above_it(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    # As if the claim `quality` had come later, and needed runs that were there: it has them all the same.
    rows = (finished / "out" / "results.csv").read_text().replace(",quality+ranks,", ",ranks,")
    (tmp_path / "out" / "results.csv").write_text(rows)
    for _ in range(2):
        done = run(tmp_path, "--report", "--docs", str(tmp_path / "page"))
        assert done.returncode == 0, done.stdout + done.stderr
        page = (tmp_path / "page.md").read_text()
        assert page.count("## Quality") == 1 and "| paper rank=2 |" in page and "against adamw" in page
        page = page.replace("# page\n", "# page\n\nWhat it means.\n", 1)
        (tmp_path / "page.md").write_text(page)
    assert page.count("What it means.") == 2  # the first was kept
    assert (tmp_path / "page.csv").read_bytes() == (finished / "out" / "results.csv").read_bytes()
    assert (tmp_path / "page_quality.png").stat().st_size > 10_000


def test_a_budget_that_holds_no_run_starts_none(tmp_path: Path) -> None:
    done = run(tmp_path, "--budget", "1s")
    assert done.returncode == 0 and "0 runs in" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "out" / "results.csv").exists()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    soon, done = run_all(command(tmp_path, "--budget", "soon"), command(tmp_path, "--only", "qualty"))
    assert "write it like 90s" in soon.stderr
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("experiment.py:")


def test_chosen_runs_answer_held_out_tasks_at_their_end(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    rows = (finished / "out" / "results.csv").read_text()
    (tmp_path / "out" / "results.csv").write_text(rows)
    for runs in (4, 0):  # two methods, two seeds; the second time nothing is left
        done = run(tmp_path, "--tasks", "quality")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("continuation") == runs
    with (tmp_path / "out" / "tasks.csv").open(newline="") as stream:
        answers = list(csv.DictReader(stream))
    assert len(answers) == 4 and all(0 < float(row["order"]) <= 1 for row in answers)
    assert "| *guessing* |" in (tmp_path / "out" / "report.md").read_text()
    # A run that does not end as its row says answers nothing.
    loss = answers[0]["val_loss"]
    (tmp_path / "out" / "results.csv").write_text(rows.replace(loss, "1.25"))
    answered = (tmp_path / "out" / "tasks.csv").read_text().splitlines(True)
    (tmp_path / "out" / "tasks.csv").write_text("".join(line for line in answered if answers[0]["id"] not in line))
    done, nothing = run_all(command(tmp_path, "--tasks", "quality"), command(tmp_path, "--tasks", "nothing"))
    assert done.returncode == 1 and "left out" in done.stdout
    assert "no results of a claim 'nothing'" in nothing.stderr


# A committed page -> its grid, and the tier of it.
PAGES = {
    "claims": ("claims", "small"),
    "claims_full": ("claims", "full"),
    "research": ("research", "small"),
    "wire": ("wire", "full"),
}
DOCS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Done]]:
    """Every page from its committed rows: the folder that it is in, and what was said."""
    folders, commands = {page: tmp_path_factory.mktemp(page) for page in PAGES}, []
    for page, (grid, tier) in PAGES.items():
        out = folders[page] / "out"
        out.mkdir()
        (out / "results.csv").write_bytes((DOCS / f"{page}.csv").read_bytes())
        answers = DOCS / f"{page}_tasks.csv"
        if answers.exists():
            (out / "tasks.csv").write_bytes(answers.read_bytes())
        options = ["--tier", tier, "--output", str(out), "--report", "--docs", str(folders[page] / page)]
        commands.append([str(ROOT / "configs" / "experiments" / f"{grid}.yaml"), *options])
    return dict(zip(PAGES, zip(folders.values(), run_all(*commands), strict=True), strict=True))


@pytest.mark.parametrize("page", PAGES)
def test_the_committed_page_says_what_the_committed_rows_say(page: str, written: dict[str, tuple[Path, Done]]) -> None:
    folder, done = written[page]
    assert done.returncode == 0, done.stderr

    def numbers(text: str) -> list[str]:
        return [line for line in text.split("<!-- report")[1].splitlines() if not line.startswith("- command")]

    assert numbers((folder / f"{page}.md").read_text()) == numbers((DOCS / f"{page}.md").read_text())
    pictures = sorted(
        path.name for path in DOCS.glob(f"{page}_*.png") if page != "claims" or "claims_full" not in path.name
    )
    assert pictures and pictures == sorted(path.name for path in folder.glob("*.png"))
