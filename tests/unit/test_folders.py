"""Directories and claims without an engine: whole, durable, and nobody else's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lordo_ds.checkpoint import claim
from lordo_ds.checkpoint.claim import Claim, Owner, read_owner
from lordo_ds.checkpoint.files import COMPLETE, read_complete
from lordo_ds.checkpoint.folders import MARK, NewFolder, recover_folder, remove_ours, remove_save, sweep, whole_folder
from lordo_ds.data.cache import build_once
from lordo_ds.disk import make_folder, old_of, part_of, write_text
from lordo_ds.errors import CheckpointError
from tests.disk import disk_calls

# -- on the disk -------------------------------------------------------------------------------------


def written(folder: Path, text: str = "x") -> None:
    with whole_folder(folder) as part:
        (part / "inner").mkdir()
        (part / "inner" / "file").write_text(text)


def test_a_folder_is_on_the_disk_before_its_list_and_the_older_one_goes_last(tmp_path: Path) -> None:
    """What `lordo ckpt reshape` and `export` write."""
    written(tmp_path / "x")
    with disk_calls() as events:
        written(tmp_path / "x", "new")
    calls = [(what, path) for _, what, path in events]
    part, home = str(part_of(tmp_path / "x")), str(tmp_path)
    listed = calls.index(("replace", f"{part}/{COMPLETE}"))
    for name in ("/inner/file", "/inner", ""):
        assert ("fsync", part + name) in calls[:listed], name
    named = calls.index(("replace", f"{home}/x"))
    assert ("fsync", part) in calls[listed:named] and ("fsync", home) in calls[named:]
    gone = min(
        i for i, (what, path) in enumerate(calls) if what in ("unlink", "rmdir") and path.endswith(f"/{COMPLETE}")
    )
    assert gone > calls.index(("fsync", home), named), "the older one goes when the new one's name is on the disk"


def test_every_new_level_is_flushed_into_the_one_above(tmp_path: Path) -> None:
    with disk_calls() as events:
        make_folder(tmp_path / "a" / "b" / "c")
        write_text(tmp_path / "a" / "text", "x")
    assert [Path(path) for _, what, path in events if what == "fsync"] == [
        tmp_path, tmp_path / "a", tmp_path / "a" / "b", part_of(tmp_path / "a" / "text"), tmp_path / "a",
    ]  # fmt: skip


def test_the_data_cache_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    order: list[str] = []
    rename = Path.rename

    def noted(self: Path, target: Path) -> Path:
        order.extend(Path(path).name for _, what, path in events if what == "fsync")
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch, disk_calls() as events:
        patch.setattr(Path, "rename", noted)
        build_once(tmp_path / "data", lambda folder: (folder / "tokens.bin").write_text("x") and None)
    assert order[0] == "tokens.bin" and order[1].startswith("data.tmp-")
    assert events[-1][1:] == ("fsync", str(tmp_path))


# -- what is not ours --------------------------------------------------------------------------------


def test_a_folder_of_others_is_neither_replaced_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, words in (("theirs", "was not made by a save"), ("file", "no directory that a save has made")):
        with pytest.raises(CheckpointError, match=words):
            written(tmp_path / name)
        with pytest.raises(CheckpointError, match=words):
            remove_save(tmp_path / name)
    for reserved in (old_of(tmp_path / "x"), part_of(tmp_path / "x")):
        os.rename(tmp_path / "theirs" if (tmp_path / "theirs").exists() else old_of(tmp_path / "x"), reserved)
        with pytest.raises(CheckpointError, match="was not made by a save: move it away"):
            written(tmp_path / "x")
        assert not (tmp_path / "x").exists()
    remove_ours(part_of(tmp_path / "x"))
    sweep(tmp_path)
    assert (part_of(tmp_path / "x") / "x").read_text() == (tmp_path / "file").read_text() == "mine"


def test_what_a_crash_leaves_is_put_back_if_it_is_whole_and_swept_if_it_is_not(tmp_path: Path) -> None:
    written(tmp_path / "x")
    os.rename(tmp_path / "x", old_of(tmp_path / "x"))
    sweep(tmp_path)  # not this: it may be the only one
    recover_folder(tmp_path / "x")
    assert read_complete(tmp_path / "x")
    os.rename(tmp_path / "x", old_of(tmp_path / "x"))
    (old_of(tmp_path / "x") / MARK).touch()  # it was being removed
    recover_folder(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    part_of(tmp_path / "y").mkdir()
    (part_of(tmp_path / "y") / MARK).write_text("")
    sweep(tmp_path)
    assert part_of(tmp_path / "y").exists(), "somebody may just have begun it"
    os.utime(part_of(tmp_path / "y") / MARK, (0, 0))
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_save_is_removed_with_its_name_first(tmp_path: Path) -> None:
    written(tmp_path / "x")
    with disk_calls() as events:
        remove_save(tmp_path / "x")
    assert events[0][1:] == ("replace", str(old_of(tmp_path / "x"))) and not list(tmp_path.iterdir())
    remove_save(tmp_path / "x")  # that is not there
    written(tmp_path / "x")
    (tmp_path / "x" / "inner" / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="notes is not of the save that it lies in"):
        remove_save(tmp_path / "x")
    assert read_complete(tmp_path / "x")


def test_the_directory_itself_may_be_the_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    recover_folder(Path())
    assert part_of(Path(".")) == tmp_path / ".x.lordo-part"


# -- claims ------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_S", 0.05), ("STALE_AFTER_S", 0.4), ("_DYING_S", 0.2), ("_SETTLED_S", 0.01)):
        monkeypatch.setattr(claim, name, seconds)


def put(path: Path, owner: Owner) -> None:
    path.write_text(json.dumps(asdict(owner)))


def test_a_claim_of_a_process_that_lives_is_refused_and_of_one_that_is_gone_taken_over(
    tmp_path: Path, quick: None
) -> None:
    path = tmp_path / "claim"
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        owner = replace(Owner.this(), pid=other.pid, started=claim._started(other.pid), job="77", token="theirs")
        put(path, owner)
        wanted = rf"the runs is in use by process {other.pid} on {socket.gethostname()}, job 77: give every job"
        with pytest.raises(CheckpointError, match=wanted):
            Claim.take(path, "the runs")
    finally:
        other.communicate(b"\n")
    mine = Claim.take(path, "the runs")
    again = Claim.take(path, "the runs")  # the same process
    with pytest.raises(CheckpointError, match="another job writes there"):
        mine.check()
    mine.release()
    assert read_owner(path) == again.owner
    again.check()
    again.release()
    assert not list(tmp_path.iterdir())


def test_from_another_machine_a_claim_counts_as_long_as_it_is_touched(tmp_path: Path, quick: None) -> None:
    path = tmp_path / "claim"
    held = Claim.take(path, "it")
    held.owner = replace(held.owner, machine="another")
    put(path, held.owner)  # its thread touches it
    time.sleep(0.1)
    with pytest.raises(CheckpointError, match="it is in use by"):
        Claim.take(path, "it")
    held._stop.set()
    began = time.monotonic()
    Claim.take(path, "it").release()
    assert 0.2 < time.monotonic() - began < 5.0
    for text in ("", "{", "[]", '{"pid": []}', "[" * 100_000):  # cut short, or of no use: nobody touches it
        path.write_text(text)
        os.utime(path, (0, 0))
        Claim.take(path, "it").release()
    assert not list(tmp_path.iterdir())


def test_an_unfinished_folder_is_left_to_the_job_that_took_it_over(tmp_path: Path, quick: None) -> None:
    new = NewFolder(tmp_path / "x")
    put(new.path / MARK, replace(new.claim.owner, token="theirs"))
    with pytest.raises(CheckpointError, match="another job writes there"):
        new.finish()
    new.abandon()
    assert (new.path / MARK).exists()
