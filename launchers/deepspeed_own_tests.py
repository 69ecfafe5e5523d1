"""DeepSpeed's own unit tests with LoRDO in the place of Adam: which pass with Adam and not with LoRDO, and why.

    git clone https://github.com/deepspeedai/DeepSpeed /tmp/DeepSpeed     # any checkout near the installed version
    python launchers/deepspeed_own_tests.py /tmp/DeepSpeed --output docs/results/deepspeed_own_tests
    python launchers/deepspeed_own_tests.py /tmp/DeepSpeed --tests unit/runtime/zero/test_unwrap_model.py

The tests run on the installed DeepSpeed, from a copy, so that the checkout's own package is not imported. First all
with torch's Adam; then those that passed, and that asked for Adam in their configuration, with LoRDO: every rank a
replica, or with `--replica-size all` one replica of all ranks that ZeRO shards. The table goes to OUTPUT.md and
OUTPUT.csv. Why a test may differ stands in deepspeed_own_tests.yaml, with the files that are run; a difference that no
entry there explains ends this script with an error. Half an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import collections
import csv
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trials.deepspeed_tests_plugin import VARIABLE
from trials.jobs import ROOT, circumstances
from trials.machine import git

HERE = Path(__file__).resolve().parent
ADAM, LORDO = "Adam", "LoRDO"
PARAMS = {"rank": 4, "sync_interval": 2}
LISTS = yaml.safe_load((HERE / "deepspeed_own_tests.yaml").read_text())
RANKS = 4


@dataclass
class Result:
    """One test with one optimizer, and the commit of this repository that it ran on."""

    outcome: str
    commit: str
    reason: str


@dataclass
class Row:
    """One test; without LoRDO's result it is not compared."""

    test: str
    asks_for_adam: bool
    adam: Result
    lordo: Result | None = None
    kind: str = ""
    why: str = ""

    @property
    def differs(self) -> bool:
        return self.lordo is not None and self.lordo.outcome != "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="of DeepSpeed's repository")
    parser.add_argument("--tests", nargs="+", help="files or tests below its tests/; default: those listed in the YAML")
    parser.add_argument("--replica-size", type=_size, default=1, help="of LoRDO, as in its JSON block; default: 1")
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds for one test")
    parser.add_argument("--work-dir", type=Path, help="keeps what the tests said; what passed there is not run again")
    parser.add_argument("--output", type=Path, default=Path("deepspeed_own_tests"))
    options = parser.parse_args()
    if not (options.checkout / "tests" / "unit" / "common.py").is_file():
        parser.error(f"{options.checkout} holds no tests/unit/common.py: give a checkout of DeepSpeed's repository")
    theirs = options.checkout / "tests"
    chosen = options.tests or [name for name in LISTS["files"] if (theirs / name.partition("::")[0]).exists()]
    params = {**PARAMS, "replica_size": options.replica_size}
    with tempfile.TemporaryDirectory(prefix="deepspeed-tests-") as temporary:
        folder = (options.work_dir or Path(temporary)).resolve()
        shutil.copytree(theirs, folder / "tests", dirs_exist_ok=True)
        rows = run_both(folder, chosen, params, options.timeout)
    explain(rows)
    of_theirs = git("-C", str(options.checkout.resolve()), "log", "-1", "--format=%h of %cs")
    # Made before anything is written: it says whether the checkout has changes.
    text = markdown(rows, params, of_theirs, options.output.name)
    write_csv(rows, options.output.with_suffix(".csv"))
    options.output.with_suffix(".md").write_text(text)
    unexplained = [row.test for row in rows if row.differs and not row.kind]
    for test in unexplained:
        print(f"unexplained: {test}")
    return 1 if unexplained else 0


def _size(text: str) -> int | str:
    return int(text) if text.isdigit() else text


# -- running -----------------------------------------------------------------------------------------


def run_both(folder: Path, chosen: list[str], params: dict[str, Any], timeout_s: float) -> list[Row]:
    """Every chosen test with Adam, and with LoRDO what says something about it."""
    found, asked = run(folder, ADAM, {}, chosen, timeout_s)
    rows = {test: Row(test, test in asked, result) for test, result in found.items()}
    wanted = [row.test for row in rows.values() if row.asks_for_adam and row.adam.outcome == "passed"]
    found, replaced = run(folder, LORDO, params, wanted, timeout_s)
    for test in wanted:
        rows[test].lordo = found.get(test, Result("failed", commit(), "the run ended before this test"))
        if test in found and found[test].outcome == "passed" and test not in replaced:
            rows[test].lordo = Result("failed", commit(), "passed, but not with LoRDO")
    return list(rows.values())


def run(
    folder: Path, optimizer: str, params: dict[str, Any], chosen: list[str], timeout_s: float
) -> tuple[dict[str, Result], set[str]]:
    """The results by test, and the tests in which the optimizer was replaced."""
    written = folder / optimizer
    written.mkdir(parents=True, exist_ok=True)
    # With Adam the entries are files, whose tests all count as done.
    kept = [one["test"] for one in read(written / "results.jsonl") if optimizer == ADAM or one["outcome"] == "passed"]
    todo = [entry for entry in chosen if not any(is_of(test, entry) for test in kept)]
    print(f"{optimizer}: {len(todo)} of {len(chosen)} files or tests are to be run", flush=True)
    if todo:
        forget(written / "errors.jsonl", todo)
        run_pytest(folder, written, optimizer, params, todo, timeout_s)
    errors = first_errors(written)
    results = {}
    for one in read(written / "results.jsonl"):
        reason = errors.get(one["test"], one["reason"]) if one["outcome"] == "failed" else one["reason"]
        results[one["test"]] = Result(one["outcome"], one["commit"], reason)
    return results, {one["test"] for one in read(written / "replaced.jsonl")}


def run_pytest(
    folder: Path, written: Path, optimizer: str, params: dict[str, Any], todo: list[str], timeout_s: float
) -> None:
    """One pytest over all of them; it leaves its results in `written`."""
    (written / "chosen.txt").write_text("\n".join(todo) + "\n")
    settings = {"optimizer": optimizer, "params": params, "folder": str(written), "commit": commit()}
    environment = {
        **os.environ,
        VARIABLE: json.dumps(settings),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), str(folder / "tests")]),
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": str(RANKS),  # what DeepSpeed takes for the number of CPU "accelerators"
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [
        *(sys.executable, "-m", "pytest", "-p", "trials.deepspeed_tests_plugin", "-p", "no:cacheprovider"),
        *("-q", "-W", "ignore", "--continue-on-collection-errors", "--tb=short", "--color=no"),
        *(f"--timeout={timeout_s:g}", f"@{written / 'chosen.txt'}"),
    ]
    with open(written / "output.txt", "w") as output:
        subprocess.run(command, cwd=folder / "tests", env=environment, stdout=output, stderr=subprocess.STDOUT)


def first_errors(written: Path) -> dict[str, str]:
    """What the first rank that failed said, by test; DeepSpeed's harness shows another's, or that time ran out."""
    first: dict[str, str] = {}
    for one in read(written / "errors.jsonl"):
        first.setdefault(one["test"], one["error"])
    return first


def commit() -> str:
    return git("rev-parse", "--short", "HEAD") or "unknown"


def forget(path: Path, tests: list[str]) -> None:
    """Drop what is written there of tests, or files, that are run again."""
    kept = [one for one in read(path) if not any(is_of(one["test"], entry) for entry in tests)]
    path.write_text("".join(json.dumps(one) + "\n" for one in kept))


def is_of(test: str, entry: str) -> bool:
    """Whether a test is the entry, or of the file, class or function that it names."""
    return test == entry or test.startswith((f"{entry}::", f"{entry}["))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# -- explaining --------------------------------------------------------------------------------------


def explain(rows: list[Row]) -> None:
    """Give each difference its kind and reason: our own refusals explain themselves, the list knows the others."""
    for row in rows:
        if row.lordo is None or not row.differs:
            continue
        for entry in LISTS["reasons"]:
            if fnmatch.fnmatch(row.test, entry["test"]) and re.search(entry.get("said", ""), row.lordo.reason):
                row.kind, row.why = entry["kind"], entry["why"]
                break
        else:
            refusal = re.search(r"(?:ConfigError|CheckpointError|ValueError): (LoRDO: .*)", row.lordo.reason)
            if refusal is not None:
                row.kind, row.why = "refused", refusal[1]


# -- the table ---------------------------------------------------------------------------------------


def write_csv(rows: list[Row], path: Path) -> None:
    with open(path, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["test", ADAM, LORDO, "kind", "why"])
        for row in rows:
            outcome = row.lordo.outcome if row.lordo else ""
            table.writerow([row.test, row.adam.outcome, outcome, row.kind or _not_compared(row), row.why])


def _not_compared(row: Row) -> str:
    if row.adam.outcome == "skipped":
        return "skipped"
    if row.adam.outcome == "failed":
        return "fails with Adam"
    return "" if row.asks_for_adam else "does not ask for Adam"


def markdown(rows: list[Row], params: dict[str, Any], theirs: str, name: str) -> str:
    compared = [row for row in rows if row.lordo is not None]
    different = [row for row in compared if row.differs]
    counts = collections.Counter(_not_compared(row) for row in rows if row.lordo is None)
    kinds = collections.Counter(row.kind or "unexplained" for row in different)
    lines = [
        "# DeepSpeed's own tests, with LoRDO in Adam's place",
        "",
        f"{circumstances()} DeepSpeed's tests: {theirs or 'commit unknown'}.{_of_earlier_commits(compared)}",
        "",
        'Only the optimizer block of each configuration changes: `"Adam"` and its kin become torch\'s Adam, or',
        f"LoRDO with their lr, betas, eps and weight_decay and {json.dumps(params)[1:-1]}. DeepSpeed's compiled",
        "operators are not built, and fp16 is left out where the processor has none.",
        "",
        f"**{len(compared)} tests ask for Adam in their configuration and pass with it.",
        f"{len(compared) - len(different)} of them pass with LoRDO, {len(different)} do not:",
        f"{', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}.**",
        "",
        f"Not compared: {', '.join(f'{n} {what}' for what, n in counts.most_common())}.",
        "",
        *_by_file(rows),
        "",
        "## What differs",
        "",
        "| kind | tests | why |",
        "|---|---|---|",
        *_by_reason(different),
        "",
        "## What was mended",
        "",
        *(f"- {entry}" for entry in LISTS["mended"]),
        "",
        f"Every test: [{name}.csv]({name}.csv).",
    ]
    return "\n".join(lines) + "\n"


def _of_earlier_commits(compared: list[Row]) -> str:
    """Which results a work directory had kept."""
    commits = collections.Counter(row.lordo.commit for row in compared if row.lordo)
    del commits[commit()]
    return "".join(f" {n} of the results with LoRDO are of commit {one}." for one, n in commits.items())


def _by_file(rows: list[Row]) -> list[str]:
    lines = ["| file | tests | compared | pass with LoRDO |", "|---|---|---|---|"]
    for file in dict.fromkeys(row.test.partition("::")[0] for row in rows):
        mine = [row for row in rows if row.test.partition("::")[0] == file]
        compared = [row for row in mine if row.lordo is not None]
        if compared:
            lines.append(f"| {file} | {len(mine)} | {len(compared)} | {sum(not row.differs for row in compared)} |")
    return lines


def _by_reason(different: list[Row]) -> list[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for row in different:
        found.setdefault((row.kind or "unexplained", row.why), []).append(row.test)
    escaped = ((kind, tests, why.replace("|", "\\|")) for (kind, why), tests in sorted(found.items()))
    return [f"| {kind} | {_short(tests)} | {why} |" for kind, tests, why in escaped]


def _short(tests: list[str]) -> str:
    """The tests without their parameters, and how many there are of each."""
    names = (f"{Path(file).name}::{rest.split('[')[0]}" for file, _, rest in (test.partition("::") for test in tests))
    return ", ".join(f"{name} ({n})" for name, n in collections.Counter(names).items())


if __name__ == "__main__":
    raise SystemExit(main())
