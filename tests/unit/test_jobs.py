"""The directory that kill_test.py and soak_test.py empty."""

from __future__ import annotations

from pathlib import Path

import pytest

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
from trials.jobs import fresh_folder  # noqa: E402


def test_a_work_directory_of_others_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit, match="was not made by this script: delete it, or give another --work-dir"):
        fresh_folder(tmp_path)
    assert (tmp_path / "mine").exists()
    for _ in range(2):
        (fresh_folder(tmp_path / "new") / "old").touch()
    assert not (fresh_folder(tmp_path / "new") / "old").exists()
