"""Which tests run here, and why the others do not.

In CI (CI=true) a suite that was selected and ran nothing is a failure: a missing package must not look green.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
from collections import Counter

import hypothesis
import pytest

# Examples have no deadline: on a busy machine 200 ms say nothing about the code.
hypothesis.settings.register_profile("lordo", deadline=None)
hypothesis.settings.load_profile("lordo")

# Set before any test module imports DeepSpeed, which picks its accelerator at import.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _gpu_count() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


GPU_COUNT = _gpu_count()
if not GPU_COUNT:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# A run in CI must execute at least one test of each of these suites that it selects.
SUITES_REQUIRED_IN_CI = ("distributed", "deepspeed", "megatron", "hf")

_SUITE_RUNS = pytest.StashKey[Counter[str]]()
_EMPTY_SUITES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores it, and so would all programs that tests start and interrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_SUITE_RUNS] = Counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    run_slow = config.getoption("--slow") or "slow" in (config.getoption("markexpr") or "")
    reasons = {
        "gpu": _no_gpu(),
        "deepspeed": _missing("deepspeed", "pip install -e '.[deepspeed]'"),
        "megatron": _missing("megatron.core", "pip install -e '.[megatron]'"),
        "hf": _missing("transformers", "pip install -e '.[hf]'"),
        "slow": None if run_slow else "takes minutes: run with --slow or -m slow",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str | None:
    if not GPU_COUNT:
        return "no NVIDIA GPU here (nvidia-smi -L lists none)"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} cannot use the GPU here"


def _missing(module: str, remedy: str) -> str | None:
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        found = False
    return None if found else f"{module} is not installed: {remedy}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    if report.when == "call" and not report.skipped:
        for marker in {marker.name for marker in item.iter_markers()}:
            item.config.stash[_SUITE_RUNS][marker] += 1
    return report


@pytest.hookimpl(tryfirst=True)  # before the terminal reporter, whose closing lines come from this hook
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    in_ci = os.environ.get("CI", "").lower() in ("1", "true")
    if not in_ci or exitstatus != pytest.ExitCode.OK or session.config.getoption("collectonly"):
        return
    empty = [suite for suite in SUITES_REQUIRED_IN_CI if _selected(session, suite) and not _ran(session, suite)]
    if empty:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.config.stash[_EMPTY_SUITES] = empty


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for suite in terminalreporter.config.stash.get(_EMPTY_SUITES, []):
        terminalreporter.write_line(
            f"CI: every selected test marked {suite!r} was skipped, which is a failure",
            red=True,
        )


def _selected(session: pytest.Session, suite: str) -> bool:
    """Whether tests of a suite were to run, those apart that CI is not expected to run."""
    return any(
        item.get_closest_marker(suite) and not item.get_closest_marker("slow") and not item.get_closest_marker("gpu")
        for item in session.items
    )


def _ran(session: pytest.Session, suite: str) -> bool:
    return session.config.stash[_SUITE_RUNS][suite] > 0
