"""What a save leaves alone, who may save where, and what is on the disk before it is called complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lordo_ds.checkpoint import open_run
from lordo_ds.checkpoint.files import COMPLETE
from lordo_ds.errors import CheckpointError
from tests.disk import Event, disk_calls
from tests.engines import GivenGradients, make_engine, settings, train_step
from tests.ranks import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]


def engine_of(scale: float = 1.0) -> Any:
    engine = make_engine(settings(zero_optimization={"stage": 1}), GivenGradients(scale=scale))
    train_step(engine, 1)
    return engine


def refusal(save: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        save()
    dist.barrier()
    return str(caught.value)


def on_rank_0(act: Callable[[], Any]) -> None:
    if dist.get_rank() == 0:
        act()
    dist.barrier()


# -- on the disk -------------------------------------------------------------------------------------


def save_twice(folder: str) -> list[Event]:
    engine = engine_of()
    engine.save_checkpoint(f"{folder}/new/levels", "t")
    train_step(engine, 2)
    with disk_calls() as events:
        engine.save_checkpoint(f"{folder}/new/levels", "t")
    engine.destroy()
    return events


def test_everything_is_on_the_disk_before_a_save_is_complete_and_the_older_one_goes_last(tmp_path: Path) -> None:
    """Power lost just after a save left complete.json and `latest`, and every tensor file empty, the older ones too."""
    events = sorted(event for of_rank in run_ranks(save_twice, 2, str(tmp_path)) for event in of_rank)
    folder = tmp_path / "new" / "levels"
    listed = json.loads((folder / "t" / COMPLETE).read_text())["files"]
    assert len(listed) == 5  # two replicas' model and optimizer, ranks.pt

    def when(kind: str, end: str, last: bool = False) -> int:
        found = [index for index, (_, what, path) in enumerate(events) if what == kind and path.endswith(end)]
        assert found, (kind, end, events)
        return found[-1 if last else 0]

    complete = when("replace", COMPLETE)
    for name in listed:
        assert when("fsync", name) < complete, name
    (part,) = {
        path.removesuffix("/ranks.pt") for _, what, path in events if what == "fsync" and path.endswith("ranks.pt")
    }
    for name in ("/replica_0", "/replica_1", ""):
        assert when("fsync", part + name, last=name != "") < complete, name
    flushed = [path for _, what, path in events[complete:] if what == "fsync"]
    assert flushed[0] == part, "the name of complete.json"
    named = when("replace", "/levels/t")
    latest = when("replace", "/latest")
    assert complete < named < latest
    assert any(what == "fsync" and path == str(folder) for _, what, path in events[named:latest]), "the new name"
    gone = [i for i, (_, what, path) in enumerate(events) if what in ("unlink", "rmdir") and path.endswith("states.pt")]
    assert gone and min(gone) > latest
    assert any(what == "fsync" and path == str(folder) for _, what, path in events[latest : min(gone)]), "latest's name"


# -- what is not ours --------------------------------------------------------------------------------


def save_beside_others(folder: str) -> dict[str, str]:
    root = Path(folder)
    engine, said = engine_of(), {}
    said["foreign"] = refusal(lambda: engine.save_checkpoint(str(root), "foreign"))
    engine.save_checkpoint(str(root), "t")
    on_rank_0(lambda: [shutil.copytree(root / "t", root / name) for name in ("t.old", "other.part", "t.part")])
    engine.save_checkpoint(str(root), "x.part")
    engine.save_checkpoint(str(root), "t")
    on_rank_0(lambda: (root / "t" / "notes.txt").write_text("mine"))
    said["notes"] = refusal(lambda: engine.save_checkpoint(str(root), "t"))
    on_rank_0(lambda: (root / "link").symlink_to(root / "t.old"))
    said["link"] = refusal(lambda: engine.save_checkpoint(str(root), "link"))
    for tag in ("latest", ".t.lordo-part", ".t.lordo-old"):
        said[tag] = refusal(lambda tag=tag: engine.save_checkpoint(str(root), tag))  # type: ignore[misc]
    on_rank_0(lambda: (root / ".held.lordo-part").mkdir() or (root / ".held.lordo-part" / "mine").write_text("mine"))
    said["held"] = refusal(lambda: engine.save_checkpoint(str(root), "held"))
    on_rank_0(lambda: (root / "empty").mkdir())
    engine.save_checkpoint(str(root), "empty")
    other = engine_of(scale=2.0)  # of the same job
    other.save_checkpoint(str(root), "of_another_engine")
    engine.save_checkpoint(str(root), "last")
    for one in (engine, other):
        one.destroy()
    return said


def test_a_save_replaces_and_removes_nothing_but_saves(tmp_path: Path) -> None:
    """A user's directory with the tag's name, `global_step4.old`, a tag called `x.part`: gone after the next save."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "data").write_text("mine")
    first, second = run_ranks(save_beside_others, 2, str(tmp_path))
    assert first == second
    assert f"{tmp_path / 'foreign'} was not made by a save of LoRDO" in first["foreign"]
    assert f"{tmp_path / 't' / 'notes.txt'} is not of the save that it lies in" in first["notes"]
    assert "link is no directory that a save has made" in first["link"]
    assert all(
        "the name of a file that saving needs" in first[tag] for tag in ("latest", ".t.lordo-part", ".t.lordo-old")
    )
    assert ".held.lordo-part was not made by a save" in first["held"]
    assert (tmp_path / "foreign" / "data").read_text() == (tmp_path / "t" / "notes.txt").read_text() == "mine"
    assert (tmp_path / ".held.lordo-part" / "mine").exists() and (tmp_path / "link").is_symlink()
    assert open_run(tmp_path).path.name == "last"
    for tag in ("t", "t.old", "t.part", "other.part", "x.part", "empty", "of_another_engine"):
        open_run(tmp_path, tag)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".held.lordo-part"]


# -- who may save where ------------------------------------------------------------------------------


def save_apart(folder: str) -> list[str]:
    from lordo_ds.adapters import shared_folder
    from lordo_ds.adapters.deepspeed import saving

    shared_folder.SEEN_WITHIN_S = 0.3
    engine, rank, said = engine_of(), dist.get_rank(), []
    said.append(refusal(lambda: engine.save_checkpoint(f"{folder}/node{rank}", "t")))
    # Two nodes, of which one sees something else than the other wrote.
    saving.host_view = lambda: (f"node{rank}", "")
    account = saving._account
    for spoil in (
        os.unlink,
        lambda path: os.truncate(path, 10),
        lambda path: path.write_bytes(b"x" * path.stat().st_size),
    ):

        def other_view(part: Path, files: list[Path], *rest: Any, spoil: Any = spoil) -> Any:
            found = account(part, files, *rest)
            if rank == 1:
                spoil(files[-1])
            return found

        saving._account = other_view
        said.append(refusal(lambda: engine.save_checkpoint(f"{folder}/shared", "t")))
    saving._account = account
    engine.save_checkpoint(f"{folder}/shared", "t")
    engine.destroy()
    return said


def test_a_save_that_not_all_nodes_see_is_not_declared_complete(tmp_path: Path) -> None:
    """Every node saved to its own disk, rank 0 declared the save complete, no load succeeded."""
    first, second = run_ranks(save_apart, 2, str(tmp_path))
    assert first == second
    assert "rank 1 (" in first[0] and f"{tmp_path}/node1) do not see what rank 0" in first[0]
    assert not list((tmp_path / "node0").iterdir()) and not (tmp_path / "node1").exists()
    for message, how in zip(first[1:], ("not there", "10 bytes", "other bytes (CRC-32)"), strict=True):
        assert "rank 1 (node1) has written" in message and f"rank 0 (node0) sees as {how}" in message, message
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == [
        "latest",
        "t",
        "zero_to_fp32.py",
        "zero_to_torch.py",
    ]
    open_run(tmp_path / "shared")


def save_beside_another_job(folder: str, alive: dict[str, Any]) -> list[str]:
    from lordo_ds.checkpoint import claim

    claim._DYING_S, claim.STALE_AFTER_S = 0.2, 0.5
    root, engine, said = Path(folder), engine_of(), []

    def writes(tag: str, owner: dict[str, Any]) -> None:
        part = root / f".{tag}.lordo-part"
        part.mkdir(exist_ok=True)
        (part / "unfinished.lordo.json").write_text(json.dumps(owner))

    on_rank_0(lambda: writes("t", alive))
    said.append(refusal(lambda: engine.save_checkpoint(folder, "t")))
    said.append(refusal(lambda: engine.save_checkpoint(folder, "u")))
    on_rank_0(lambda: writes("t", {**alive, "started": "1"}))  # that process has ended: its number is another's now
    engine.save_checkpoint(folder, "u")
    on_rank_0(lambda: writes("t", {**alive, "machine": "another", "host": "far"}))  # not touched for some time
    engine.save_checkpoint(folder, "t")
    engine.destroy()
    return said


def test_a_directory_into_which_another_job_is_saving_is_refused(tmp_path: Path) -> None:
    from dataclasses import asdict

    from lordo_ds.checkpoint.claim import Owner

    first, second = run_ranks(save_beside_another_job, 2, str(tmp_path), asdict(Owner.this()))
    assert first == second
    for message in first:
        assert (
            f"is in use by process {os.getpid()} on" in message and "give every job a directory of its own" in message
        )
    assert open_run(tmp_path, "u").path.is_dir() and open_run(tmp_path).path.name == "t"
    assert not list(tmp_path.glob(".*"))
