"""Checkpoints that were damaged, cut short, made by others, or never finished: refused by name, nothing half-loaded."""

from __future__ import annotations

import copy
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lordo_ds
from lordo_ds.checkpoint import open_run, read_saved
from lordo_ds.checkpoint.files import COMPLETE, file_sum, write_complete
from lordo_ds.checkpoint.folders import NewFolder
from lordo_ds.cli.main import main
from lordo_ds.disk import old_of, part_of
from lordo_ds.errors import CheckpointError
from tests.engines import GivenGradients, make_engine, settings, train_step, weights
from tests.ranks import RankFailedError, run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]

TAG = "global_step4"
OPTIMIZER = "replica_1/zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODEL = "replica_0/mp_rank_00_model_states.pt"


def engine_of(scale: float = 1.0) -> Any:
    return make_engine(settings(zero_optimization={"stage": 1}), GivenGradients(scale=scale))


def save(folder: str) -> dict[str, Tensor]:
    engine = engine_of()
    for step in range(1, 7):
        train_step(engine, step)
        if step in (3, 4):
            engine.save_checkpoint(folder)
    found = weights(engine)
    engine.destroy()
    return found


# -- what may go wrong -------------------------------------------------------------------------------


def seal(tag: Path) -> None:
    """List the files anew: what a forger, or a fault before the sums were taken, would do."""
    files = [path for path in tag.rglob("*") if path.is_file() and path.name != COMPLETE]
    write_complete(tag, {str(path.relative_to(tag)): file_sum(path) for path in files})


def truncated(tag: Path) -> None:
    os.truncate(tag / OPTIMIZER, (tag / OPTIMIZER).stat().st_size - 100)


def truncated_and_sealed(tag: Path) -> None:
    truncated(tag)
    seal(tag)


def flipped(tag: Path) -> None:
    data = bytearray((tag / OPTIMIZER).read_bytes())
    data[len(data) // 2] ^= 4
    (tag / OPTIMIZER).write_bytes(data)


def file_missing(tag: Path) -> None:
    (tag / OPTIMIZER).unlink()


def never_finished(tag: Path) -> None:
    (tag / COMPLETE).unlink()


def only_a_part(tag: Path) -> None:
    tag.rename(part_of(tag))


def newer_list(tag: Path) -> None:
    (tag / COMPLETE).write_text(json.dumps({"format": 2, "files": {}}))


def garbled_list(tag: Path) -> None:
    (tag / COMPLETE).write_text("{not json")


def replica_missing(tag: Path) -> None:
    shutil.rmtree(tag / "replica_1")


def changed(tag: Path, change: Callable[[Any], None]) -> None:
    saved = torch.load(tag / OPTIMIZER, weights_only=False)
    change(saved["optimizer_state_dict"]["base_optimizer_state"])
    torch.save(saved, tag / OPTIMIZER)
    seal(tag)


def newer_state(tag: Path) -> None:
    changed(tag, lambda state: state["lordo"].update(format=4))


def older_state(tag: Path) -> None:
    changed(tag, lambda state: state["lordo"].update(format=1))


def garbled_state(tag: Path) -> None:
    changed(tag, lambda state: state["lordo"]["mesh"].update(shards="two"))


def others_state(tag: Path) -> None:
    changed(tag, lambda state: state.pop("lordo"))


def tensor_missing(tag: Path) -> None:
    changed(tag, lambda state: state["state"][0]["tall"].pop("exp_avg"))


def other_shape(tag: Path) -> None:
    changed(tag, lambda state: state["state"][0]["wide"].update(basis=torch.zeros(7, 7)))


class Surprise:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/lordo-ran-code-from-a-checkpoint",)


def code(tag: Path) -> None:
    saved = torch.load(tag / MODEL, weights_only=False)
    torch.save({**saved, "surprise": Surprise()}, tag / MODEL)
    seal(tag)


def not_torch(tag: Path) -> None:
    (tag / OPTIMIZER).write_bytes(b"\x80\x02hello")
    seal(tag)


DAMAGES: dict[Callable[[Path], None], str] = {
    truncated: "optim_states.pt has .* bytes, not .*: it is truncated",
    truncated_and_sealed: "optim_states.pt cannot be read: .*truncated, damaged or no checkpoint",
    flipped: "optim_states.pt has changed since it was saved",
    file_missing: "optim_states.pt is missing, which complete.json lists",
    never_finished: "has no complete.json: saving it did not finish",
    only_a_part: "there is no checkpoint .*; a save ended before it was complete and left .global_step4.lordo-part",
    newer_list: "complete.json: format 2 is not 1: install a newer lordo_ds",
    garbled_list: "complete.json is damaged",
    replica_missing: "is missing, which complete.json lists",
    newer_state: "format 4 is not 3: install a newer lordo_ds",
    older_state: "format 1 is not 3: load it with the version that saved it",
    garbled_state: "is damaged: mesh.shards",
    others_state: "was not saved by LoRDO",
    tensor_missing: "tall has no 'exp_avg'",
    other_shape: "'basis' of wide is",
    code: "holds an object of .*mkdir.*, and loading runs no code",
    not_torch: "optim_states.pt cannot be read",
}


def load_each(folder: str, names: list[str], expected: dict[str, Tensor]) -> dict[str, tuple[str, str, bool]]:
    """For every damaged copy, how both ways of loading refuse it, and whether the engine goes on as if not asked."""
    found = {}
    engine = engine_of(scale=3.0)
    engine.load_checkpoint(os.path.join(folder, "intact"), TAG)
    before = weights(engine)
    for name in names:
        messages = []
        for reshape in (False, True):
            with pytest.raises(ValueError) as caught:
                lordo_ds.load_checkpoint(engine, os.path.join(folder, name), TAG, reshape=reshape)
            assert type(caught.value) is CheckpointError, repr(caught.value)
            messages.append(str(caught.value))
        same = all(torch.equal(weight, before[key]) for key, weight in weights(engine).items())
        found[name] = (messages[0], messages[1], same)
    for step in (5, 6):
        train_step(engine, step)
    assert all(torch.equal(weight, expected[key]) for key, weight in weights(engine).items())
    engine.destroy()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("damaged")
    return folder, run_ranks(save, 2, str(folder / "intact"))


def test_every_damage_is_refused_by_name_on_all_ranks_and_nothing_is_changed(saved: Any) -> None:
    import re

    folder, ranks = saved
    for damage in DAMAGES:
        shutil.copytree(folder / "intact" / TAG, folder / damage.__name__ / TAG)
        damage(folder / damage.__name__ / TAG)
    names = [damage.__name__ for damage in DAMAGES]
    first, second = run_ranks(load_each, 2, str(folder), names, ranks[0])
    for damage, pattern in DAMAGES.items():
        native, reshaped, same = first[damage.__name__]
        assert second[damage.__name__] == first[damage.__name__], "the ranks agree"
        assert same, damage.__name__
        assert re.search(pattern, native) or damage is replica_missing, (damage.__name__, native)
        assert "\n" not in native + reshaped and str(folder) in native + reshaped
        assert re.search(pattern, reshaped), (damage.__name__, reshaped)
    assert not Path("/tmp/lordo-ran-code-from-a-checkpoint").exists()


def test_the_same_damages_are_refused_without_processes(saved: Any, tmp_path: Path) -> None:
    for damage, pattern in DAMAGES.items():
        tag = tmp_path / damage.__name__ / TAG
        shutil.copytree(saved[0] / "intact" / TAG, tag)
        damage(tag)
        with pytest.raises(CheckpointError, match=pattern):
            run = open_run(tag.parent, TAG)
            for name in run.parameters:
                for m in range(run.replicas):
                    run.check_state(name, m)
            run.engine_state(0)


# -- forged on purpose -------------------------------------------------------------------------------


def header_of(state: Any) -> dict[str, Any]:
    return state["lordo"]  # type: ignore[no-any-return]


def fragment_of(state: Any, name: str = "tall") -> dict[str, Any]:
    return next(one for one in header_of(state)["fragments"] if one["name"] == name)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def shared(levels: int) -> Any:
    """Small in a file, and 10^levels values to whoever walks through it."""
    value: Any = 1
    for _ in range(levels):
        value = [value] * 10
    return value


HUGE = 10**12
FORGED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "mesh of many stages": (lambda s: header_of(s)["mesh"].update(stages=HUGE, slices=HUGE), "not of 10{24}; "),
    "mesh of many shards": (lambda s: header_of(s)["mesh"].update(shards=HUGE), "the states of 1 ranks, not of 10{12}"),
    "mesh beyond 64 bits": (lambda s: header_of(s)["mesh"].update(shards=10**30), "damaged: mesh.shards: "),
    "partitions": (lambda s: fragment_of(s).update(partitions=HUGE, partition_dim=0), "'tall' has 10{12} slices along"),
    "partition_dim": (lambda s: fragment_of(s).update(partition_dim=7), "'tall' has partition_dim 7 and 2 dimensions"),
    "partition_stride": (lambda s: fragment_of(s).update(partition_stride=HUGE), "'tall' has 10{12} blocks"),
    "rank": (lambda s: fragment_of(s).update(rank=HUGE), "'tall' has rank 10{12} of a matrix"),
    "shape": (lambda s: fragment_of(s).update(shape=(HUGE, 6)), "'tall', which has 60{12}: it is damaged"),
    "dense shape": (lambda s: fragment_of(s, "bias").update(shape=(HUGE,)), "'bias', which has 10{12}: it is damaged"),
    "shape and interval": (
        lambda s: fragment_of(s).update(shape=(HUGE, 6), interval=(0, 6 * HUGE)), "elements of tall, not 60{12}"
    ),
    "shape beyond 64 bits": (lambda s: fragment_of(s).update(shape=(2**40, 2**40)), "shape: .*no tensor has so many"),
    "interval": (lambda s: fragment_of(s).update(interval=(5, 4)), "'tall' has the elements 5 to 4 of"),
    "tensor": (lambda s: fragment_of(s).update(tensor=HUGE), "has no weights of tall: it is damaged"),
    "offset": (lambda s: fragment_of(s).update(offset=2**63 - 1), "holds 0 elements of tall"),
    "settings nested deep": (lambda s: header_of(s)["settings"].update(outer=deep(100)), "nested deeper than"),
    "settings of many": (lambda s: header_of(s)["settings"].update(outer=shared(12)), "more than 10000 values"),
    "format nested deep": (lambda s: header_of(s).update(format=deep(100)), "its format is no number"),
    "format of many digits": (lambda s: header_of(s).update(format=10**200), "its format is no number"),
    "step": (lambda s: s["state"][0]["tall"].update(step=10**30), "'step' of tall is"),
    "steps": (lambda s: header_of(s)["counters"].update(syncs=10**200), "damaged: counters.syncs"),
    "stretched tensor": (
        lambda s: s["state"][0]["tall"].update(exp_avg=torch.zeros(1).expand(3, 20)), "'exp_avg' of tall is larger"
    ),
    "untrained": (
        lambda s: header_of(s)["engine"].update(untrained=[{"name": "x", "shape": (2,), "partitions": HUGE}]),
        "'x' has 10{12} slices",
    ),
}  # fmt: skip


@pytest.mark.timeout(60)
def test_no_count_in_a_header_is_believed_beyond_what_its_file_holds(saved: Any, tmp_path: Path) -> None:
    """A `mesh` of millions made `lordo ckpt show` run for ever."""
    tag = tmp_path / TAG
    shutil.copytree(saved[0] / "intact" / TAG, tag)
    shutil.rmtree(tag / "replica_1")  # of one replica
    file = tag / MODEL.replace("mp_rank_00_model", "zero_pp_rank_0_mp_rank_00_optim")
    intact = torch.load(file, weights_only=False)
    for name, (forge, pattern) in FORGED.items():
        forged = copy.deepcopy(intact)
        header = header_of(forged["optimizer_state_dict"]["base_optimizer_state"])
        header["mesh"]["replicas"] = 1
        forge(forged["optimizer_state_dict"]["base_optimizer_state"])
        torch.save(forged, file)
        seal(tag)
        with pytest.raises(CheckpointError, match=pattern) as caught:
            run = open_run(tmp_path, TAG)
            for parameter in run.parameters:
                run.check_state(parameter, 0)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, name


def test_a_compressed_record_is_refused(saved: Any, tmp_path: Path) -> None:
    """It may unfold to any size."""
    source = saved[0] / "intact" / TAG / MODEL
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "new.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.namelist():
            new.writestr(record, old.read(record))
    with pytest.raises(CheckpointError, match="compressed records, which torch does not write"):
        read_saved(tmp_path / "new.pt")
    read_saved(source)


def test_names_are_printed_as_text(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tag = tmp_path / TAG
    shutil.copytree(saved[0] / "intact" / TAG, tag)

    def rename(state: Any) -> None:
        fragment_of(state)["name"] = "ta\x1b[31mll\nline"
        header_of(state)["settings"]["basis_source"] = "\x1b]0;title\x07"

    changed(tag, rename)
    file = tag / OPTIMIZER
    shutil.copy(file, tag / OPTIMIZER.replace("replica_1", "replica_0"))
    seal(tag)
    assert main(["ckpt", "show", str(tag), "--parameters"]) == 0
    said = capsys.readouterr().out
    assert "ta\\x1b[31mll\\nline" in said and not [one for one in said if not one.isprintable() and one != "\n"]
    assert main(["ckpt", "show", str(tmp_path / "no\x1b[31m")]) == 1
    assert "no\\x1b[31m" in capsys.readouterr().err


# -- saving that does not finish ---------------------------------------------------------------------


def save_and_die(folder: str, at: str) -> None:
    """Save a first time, then again, and end without warning on the way."""
    from lordo_ds.adapters.deepspeed import saving

    engine = engine_of()
    for step in range(1, 5):
        train_step(engine, step)
        if step == 3:
            engine.save_checkpoint(folder)
    owner = saving if hasattr(saving, at) else NewFolder
    original = getattr(owner, at)

    def dies(*args: Any, **kwargs: Any) -> Any:
        if engine.global_rank == 0:
            os.kill(os.getpid(), 9)
        return original(*args, **kwargs)

    setattr(owner, at, dies)
    engine.save_checkpoint(folder)


def resume(folder: str) -> tuple[int, bool]:
    engine = engine_of(scale=3.0)
    engine.load_checkpoint(folder)
    loaded = engine.global_steps
    train_step(engine, loaded + 1)
    engine.save_checkpoint(folder, "again")
    engine.save_checkpoint(folder, "again")
    engine.destroy()
    return loaded, sorted(os.listdir(folder))  # type: ignore[return-value]


@pytest.mark.parametrize(("at", "step"), [("file_sum", 3), ("write_complete", 3), ("finish", 3), ("write_text", 3)])
def test_a_crash_while_saving_leaves_the_checkpoint_before(tmp_path: Path, at: str, step: int) -> None:
    with pytest.raises(RankFailedError):
        run_ranks(save_and_die, 2, str(tmp_path), at)
    assert (tmp_path / "latest").read_text() == "global_step3"
    for loaded, files in run_ranks(resume, 2, str(tmp_path)):
        assert loaded == step and "again" in files and not [name for name in files if name.startswith(".")]


def test_a_directory_that_was_being_replaced_is_put_back(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved[0] / "intact" / TAG, tmp_path / TAG)
    (tmp_path / TAG).rename(old_of(tmp_path / TAG))  # between the two renames
    assert open_run(tmp_path, TAG).replicas == 2
    assert (tmp_path / TAG).is_dir()
    new = NewFolder(tmp_path / TAG)
    (new.path / "new").write_text("")
    write_complete(new.path, {"new": (0, 0)})
    new.finish()
    new.remove_old()
    assert [path.name for path in tmp_path.iterdir()] == [TAG] and (tmp_path / TAG / "new").exists()


def save_objects(folder: str) -> str:
    engine = engine_of()
    train_step(engine, 1)
    with pytest.raises(CheckpointError) as caught:
        engine.save_checkpoint(folder, client_state={"bad": Path("x")})
    engine.save_checkpoint(folder, client_state={"good": [1, "two", torch.ones(3)]})
    engine.destroy()
    return str(caught.value)


def test_a_client_state_that_could_not_be_loaded_is_refused_when_saving(tmp_path: Path) -> None:
    for message in run_ranks(save_objects, 2, str(tmp_path)):
        assert "the checkpoint would hold an object of pathlib" in message
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["global_step1"]
