"""DeepSpeed's own unit tests with LoRDO in the place of Adam: which pass with Adam and not with LoRDO, and why.

    git clone https://github.com/deepspeedai/DeepSpeed /tmp/DeepSpeed     # any checkout near the installed version
    python launchers/deepspeed_own_tests.py /tmp/DeepSpeed --output docs/deepspeed_own_tests
    python launchers/deepspeed_own_tests.py /tmp/DeepSpeed --tests unit/runtime/zero/test_unwrap_model.py

The tests run on the installed DeepSpeed, from a copy, so that the checkout's own package is not imported. First all
with torch's Adam; then those that passed, and that asked for Adam in their configuration, twice with LoRDO: every rank
a replica, and all ranks one replica that ZeRO shards. The table goes to OUTPUT.md and OUTPUT.csv. Why a test may differ
stands in deepspeed_own_tests.yaml, with the files that are run; a difference that no entry there explains ends this
script with an error. About an hour on two cores.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from _deepspeed_tests_plugin import VARIABLE
from _jobs import ROOT, circumstances
from _machine import git

LORDO = {"rank": 4, "sync_interval": 2}
VARIANTS = {
    "Adam": ("Adam", {}),
    "replicas": ("LoRDO", LORDO),
    "one replica": ("LoRDO", {**LORDO, "replica_size": "all"}),
}
HERE = Path(__file__).resolve().parent
LISTS = yaml.safe_load((HERE / "deepspeed_own_tests.yaml").read_text())
RANKS = 4


@dataclass
class Result:
    """One test with one optimizer."""

    outcome: str
    commit: str
    reason: str


@dataclass
class Row:
    """One test with all of them."""

    test: str
    asks_for_adam: bool
    results: dict[str, Result] = field(default_factory=dict)
    kind: str = ""
    why: str = ""

    @property
    def differs(self) -> bool:
        return self.results["Adam"].outcome == "passed" and any(r.outcome != "passed" for r in self.results.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="of DeepSpeed's repository")
    parser.add_argument("--tests", nargs="+", help="files or tests below its tests/; default: those listed beside this")
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds for one test")
    parser.add_argument(
        "--work-dir", type=Path, help="keeps what the tests said; what is there already is not run again"
    )
    parser.add_argument("--output", type=Path, default=Path("deepspeed_own_tests"))
    options = parser.parse_args()
    if not (options.checkout / "tests" / "unit" / "common.py").is_file():
        parser.error(f"{options.checkout} holds no tests/unit/common.py: give a checkout of DeepSpeed's repository")
    chosen = options.tests or [name for name in LISTS["files"] if (options.checkout / "tests" / name).exists()]
    with tempfile.TemporaryDirectory(prefix="deepspeed-tests-") as temporary:
        folder = options.work_dir or Path(temporary)
        shutil.copytree(options.checkout / "tests", folder / "tests", dirs_exist_ok=True)
        rows = run_all(folder, chosen, options.timeout)
    explain(rows)
    write_csv(rows, options.output.with_suffix(".csv"))
    theirs = git("-C", str(options.checkout.resolve()), "log", "-1", "--format=%h of %cs")
    options.output.with_suffix(".md").write_text(markdown(rows, theirs, options.output.name))
    unexplained = [row.test for row in rows if row.differs and not row.kind]
    for test in unexplained:
        print(f"unexplained: {test}")
    return 1 if unexplained else 0


# -- running -----------------------------------------------------------------------------------------


def run_all(folder: Path, chosen: list[str], timeout_s: float) -> list[Row]:
    """Every chosen test with Adam, and with LoRDO what says something about it."""
    found, asked = run(folder, "Adam", chosen, timeout_s)
    rows = [Row(test, test in asked, {"Adam": result}) for test, result in found.items()]
    wanted = [row.test for row in rows if row.asks_for_adam and row.results["Adam"].outcome == "passed"]
    for variant in VARIANTS:
        if variant == "Adam" or not wanted:
            continue
        found, replaced = run(folder, variant, wanted, timeout_s)
        for row in rows:
            if row.test not in wanted or row.test not in found:
                continue
            row.results[variant] = found[row.test]
            if row.results[variant].outcome == "passed" and row.test not in replaced:
                row.results[variant] = Result("failed", commit(), "passed, but not with LoRDO")
    return rows


def run(folder: Path, variant: str, chosen: list[str], timeout_s: float) -> tuple[dict[str, Result], set[str]]:
    """The results by test, and the tests in which the optimizer was replaced."""
    optimizer, params = VARIANTS[variant]
    written = folder / variant.replace(" ", "_")
    written.mkdir(parents=True, exist_ok=True)
    done = [
        line["test"] for line in read(written / "results.jsonl") if variant == "Adam" or line["outcome"] == "passed"
    ]
    todo = [entry for entry in chosen if not any(test.startswith(entry) for test in done)]
    (written / "chosen.txt").write_text("\n".join(todo) + "\n")
    environment = {
        **os.environ,
        VARIABLE: json.dumps({"optimizer": optimizer, "params": params, "folder": str(written), "commit": commit()}),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), str(folder / "tests")]),
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": str(RANKS),  # what DeepSpeed takes for the number of CPU "accelerators"
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [
        *(
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "_deepspeed_tests_plugin",
            "-p",
            "no:cacheprovider",
            "-q",
            "-W",
            "ignore",
        ),
        *("--continue-on-collection-errors", "--tb=short", "--color=no", f"--timeout={timeout_s:g}"),
        f"@{written / 'chosen.txt'}",
    ]
    print(f"{variant}: {len(todo)} of {len(chosen)} files or tests are to be run", flush=True)
    if todo:
        forget(written / "errors.jsonl", todo)
        with open(written / "output.txt", "w") as output:
            subprocess.run(command, cwd=folder / "tests", env=environment, stdout=output, stderr=subprocess.STDOUT)
    results = {}
    errors = first_errors(written)
    for line in read(written / "results.jsonl"):
        reason = errors.get(line["test"], line["reason"]) if line["outcome"] == "failed" else line["reason"]
        results[line["test"]] = Result(line["outcome"], line["commit"], reason)
    return results, {line["test"] for line in read(written / "replaced.jsonl")}


def commit() -> str:
    return git("rev-parse", "--short", "HEAD") or "unknown"


def forget(path: Path, tests: list[str]) -> None:
    """Drop what is written there of tests, or files, that are run again."""
    kept = [line for line in read(path) if not line["test"].startswith(tuple(tests))]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def first_errors(written: Path) -> dict[str, str]:
    """What the first rank that failed said, by test; DeepSpeed's harness shows another's, or that time ran out."""
    first: dict[str, str] = {}
    for line in read(written / "errors.jsonl"):
        first.setdefault(line["test"], line["error"])
    return first


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# -- explaining --------------------------------------------------------------------------------------


def explain(rows: list[Row]) -> None:
    """Give each difference its kind and reason: our own refusals explain themselves, the list knows the others."""
    for row in rows:
        if not row.differs:
            continue
        said = next(result.reason for result in row.results.values() if result.outcome != "passed")
        for entry in LISTS["reasons"]:
            if fnmatch.fnmatch(row.test, entry["test"]) and re.search(entry.get("said", ""), said):
                row.kind, row.why = entry["kind"], entry["why"]
                break
        else:
            refusal = re.search(r"(?:ConfigError|CheckpointError|ValueError): (LoRDO: .*)", said)
            if refusal is not None:
                row.kind, row.why = "refused", refusal[1].replace(str(tempfile.gettempdir()), "...")


# -- the table ---------------------------------------------------------------------------------------


def write_csv(rows: list[Row], path: Path) -> None:
    with open(path, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["test", *VARIANTS, "kind", "why"])
        for row in rows:
            outcomes = [row.results[name].outcome if name in row.results else "" for name in VARIANTS]
            table.writerow([row.test, *outcomes, row.kind or _not_compared(row), row.why])


def _not_compared(row: Row) -> str:
    if row.results["Adam"].outcome == "skipped":
        return "skipped"
    if row.results["Adam"].outcome == "failed":
        return "fails with Adam"
    return "" if row.asks_for_adam else "does not ask for Adam"


def markdown(rows: list[Row], checkout: str, name: str) -> str:
    compared = [row for row in rows if len(row.results) > 1]
    same = sum(not row.differs for row in compared)
    not_run = sum(len(row.results) < len(VARIANTS) for row in compared)
    counts = collections.Counter(_not_compared(row) for row in rows if row not in compared)
    kinds = collections.Counter(row.kind or "unexplained" for row in compared if row.differs)
    lines = [
        "# DeepSpeed's own tests, with LoRDO in Adam's place",
        "",
        f"{circumstances()} DeepSpeed's tests: {checkout or 'commit unknown'}.{_of_earlier_commits(rows)}",
        "",
        'Only the optimizer block of each configuration changes: `"Adam"` and its kin become torch\'s Adam, or',
        f"`LoRDO` with their lr, betas, eps and weight_decay and {json.dumps(LORDO)[1:-1]}. Once every rank",
        "is a replica, once all ranks are one. DeepSpeed's compiled operators are not built.",
        "",
        f"**{len(compared)} tests ask for Adam in their configuration and pass with it; {same} of them pass with LoRDO",
        f"both ways, {len(compared) - same} do not: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}.**",
        "",
        f"Not compared: {', '.join(f'{n} {what}' for what, n in counts.most_common() if what)}."
        + (f" {not_run} were run one way only." if not_run else ""),
        "",
        *_by_file(rows),
        "",
        "## What differs",
        "",
        "| kind | tests | why |",
        "|---|---|---|",
        *_by_reason(compared),
        "",
        "## What was mended",
        "",
        *(f"- {entry}" for entry in LISTS["mended"]),
        "",
        f"Every test: [{name}.csv]({name}.csv).",
    ]
    return "\n".join(lines) + "\n"


def _of_earlier_commits(rows: list[Row]) -> str:
    """Which results a work directory had kept."""
    commits = collections.Counter(r.commit for row in rows for name, r in row.results.items() if name != "Adam")
    del commits[commit()]
    return "".join(f" {n} of the results with LoRDO are of commit {one}." for one, n in commits.items())


def _by_file(rows: list[Row]) -> list[str]:
    lines = ["| file | tests | compared | pass with LoRDO |", "|---|---|---|---|"]
    for file in dict.fromkeys(row.test.partition("::")[0] for row in rows):
        mine = [row for row in rows if row.test.partition("::")[0] == file]
        compared = [row for row in mine if len(row.results) > 1]
        if compared:
            lines.append(f"| {file} | {len(mine)} | {len(compared)} | {sum(not row.differs for row in compared)} |")
    return lines


def _by_reason(compared: list[Row]) -> list[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for row in compared:
        if row.differs:
            found.setdefault((row.kind or "unexplained", row.why), []).append(row.test)
    return [
        f"| {kind} | {_short(tests)} | {why.replace('|', chr(92) + '|')} |"
        for (kind, why), tests in sorted(found.items())
    ]


def _short(tests: list[str]) -> str:
    """The tests without their parameters, and how many there are of each."""
    counts = collections.Counter(
        f"{Path(t.partition('::')[0]).name}::{t.partition('::')[2].split('[')[0]}" for t in tests
    )
    return ", ".join(f"{name} ({n})" for name, n in counts.items())


if __name__ == "__main__":
    raise SystemExit(main())
