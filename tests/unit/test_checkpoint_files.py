"""The parts of a checkpoint that need no engine: files, headers, pieces of parameters, generators."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lordo_ds.checkpoint import ReshapedRun, open_run, read_saved, rng_state, set_rng_state
from lordo_ds.checkpoint.files import COMPLETE, find_tag, read_complete
from lordo_ds.checkpoint.folders import whole_folder
from lordo_ds.checkpoint.header import Counters, FragmentLayout, Header
from lordo_ds.checkpoint.pieces import Place, check_part, cut, join, part_shape, slicing_dim
from lordo_ds.checkpoint.portable import PortableRun, write_portable
from lordo_ds.checkpoint.reshaped_run import mean_state, with_rank
from lordo_ds.checkpoint.run import EngineState, SavedParameter, SavedRun
from lordo_ds.checkpoint.tensor_file import TensorFile, TensorWriter
from lordo_ds.cli.main import main
from lordo_ds.core.slices import cut_slice, join_slices
from lordo_ds.errors import CheckpointError

FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# -- pieces ------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: Any) -> tuple[tuple[int, int], str, int | None, int, int, list[tuple[int, int]]]:
    """(shape of a slice, side, partition dimension, slices, stride, intervals of the shards)."""
    dim = draw(st.sampled_from([None, 0, 1]))
    slices = 1 if dim is None else draw(st.integers(1, 3))
    stride = 1 if dim is None else draw(st.integers(1, 2))
    shape = [draw(st.integers(1, 7)), draw(st.integers(1, 7))]
    if dim is not None:
        shape[dim] *= stride
    side = {None: draw(st.sampled_from(["rows", "columns"])), 0: "columns", 1: "rows"}[dim]
    numel = shape[0] * shape[1]
    edges = sorted(draw(st.lists(st.integers(0, numel), max_size=3)))
    bounds = [0, *edges, numel]
    intervals = [(a, b) if a < b else (0, 0) for a, b in pairwise(bounds)]
    return (shape[0], shape[1]), side, dim, slices, stride, intervals


def places_of(drawn: Any, rank: int = 2, low_rank: bool = True) -> list[list[Place]]:
    shape, side, dim, slices, stride, intervals = drawn
    return [
        [
            Place(
                FragmentLayout(
                    name="w", shape=shape, partition_dim=dim, partitions=slices, partition_stride=stride,
                    low_rank=low_rank, side=side if low_rank else "", rank=rank, interval=interval, tensor=0, offset=0,
                ),
                tuple(intervals), shard, index,
            )
            for shard, interval in enumerate(intervals)
        ]
        for index in range(slices)
    ]  # fmt: skip


@given(layouts(), st.booleans())
def test_cutting_and_joining_gives_the_whole_back(drawn: Any, low_rank: bool) -> None:
    places = places_of(drawn, low_rank=low_rank)
    for key in ("weight", "exp_avg", "exp_avg_sq", "basis", "row_mean_sq", "col_mean_sq", "error"):
        if not low_rank and key in ("basis", "row_mean_sq", "col_mean_sq"):
            continue
        shape = list(places[0][0].slice_shape(key))
        dim = slicing_dim(key, places[0][0].layout)
        if dim is not None:
            shape[dim] *= len(places)
        whole = torch.randn(shape)
        parts = [[cut(key, whole, place).clone() for place in of_slice] for of_slice in places]
        for of_slice, tensors in zip(places, parts, strict=True):
            for place, tensor in zip(of_slice, tensors, strict=True):
                assert tensor.numel() == torch.Size(part_shape(key, place)).numel()
        assert torch.equal(join(key, list(zip(places, parts, strict=True))), whole), key


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 1]))
def test_slices_are_those_of_megatron(count: int, stride: int, blocks: int, dim: int) -> None:
    shape = [2, 3]
    shape[dim] = count * stride * blocks
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    slices = [cut_slice(whole, dim, stride, index, count) for index in range(count)]
    assert torch.equal(join_slices(slices, dim, stride), whole)
    if stride == 2:  # a rank's part is [its share of the first half; its share of the second]
        first = whole.chunk(2, dim)[0].chunk(count, dim)[0]
        assert torch.equal(slices[0].narrow(dim, 0, blocks), first)


def test_a_part_of_another_size_is_refused_by_name() -> None:
    drawn = ((4, 3), "columns", None, 1, 1, [(0, 5), (5, 12)])
    ((place, _),) = places_of(drawn)
    good = {key: torch.zeros(part_shape(key, place)) for key in ("exp_avg", "exp_avg_sq", "basis")}
    state: dict[str, Any] = {**good, "step": 3, "has_basis": True}
    check_part(state, place, "here")
    for key, value in (("basis", torch.zeros(9)), ("step", True), ("has_basis", 1), ("exp_avg", "text")):
        with pytest.raises(CheckpointError, match=f"here: '{key}' of w is .*damaged"):
            check_part({**state, key: value}, place, "here")
    del state["exp_avg_sq"]
    with pytest.raises(CheckpointError, match="the state of w has no 'exp_avg_sq'"):
        check_part(state, place, "here")
    parts = [torch.zeros(5), torch.zeros(6)]
    with pytest.raises(CheckpointError, match="'weight' of w: a shard keeps"):
        join("weight", [(list(places_of(drawn)[0]), parts)])


# -- a small run in memory ---------------------------------------------------------------------------


class MemoryRun(SavedRun):
    """Two replicas between syncs; one matrix (6, 4) with its basis on columns, and a bias."""

    def __init__(self, replicas: int = 2, synced: bool = False, **settings_: Any) -> None:
        self.path, self.replicas, self.mesh = Path("memory"), replicas, "in memory"
        self.settings = {"rank": 2, "betas": [0.9, 0.99], "projection": "global", **settings_}
        self.parameters = {
            "w": SavedParameter("w", (6, 4), True, "columns", 2),
            "b": SavedParameter("b", (3,), False),
        }
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        basis = torch.linalg.qr(draw(4, 2)).Q
        anchor = {"w": draw(6, 4), "b": draw(3)}
        self.states = {
            ("w", m): {
                "weight": anchor["w"] + (0 if synced else m), "anchor": anchor["w"], "basis": basis, "has_basis": True,
                "exp_avg": draw(2, 6), "exp_avg_sq": draw(2, 6).square(), "error": draw(6, 4), "step": 4 - m,
            }
            for m in range(replicas)
        } | {
            ("b", m): {
                "weight": anchor["b"] + (0 if synced else m), "anchor": anchor["b"],
                "exp_avg": draw(3), "exp_avg_sq": draw(3).square(), "step": 4,
            }
            for m in range(replicas)
        }  # fmt: skip
        self.last = 4 if synced else 3

    def state(self, name: str, replica: int) -> dict[str, Any]:
        return dict(self.states[name, replica])

    def check_state(self, name: str, replica: int) -> None:
        pass

    def counters(self, replica: int) -> Counters:
        return Counters(attempted_steps=4, executed_steps=4 - replica, syncs=1, last_synced_step=self.last)

    def bytes_sent(self, replica: int) -> dict[str, int]:
        return {"header": replica}

    def rows(self) -> list[list[float]]:
        return [[1.5]]

    def untrained(self, replica: int) -> dict[str, Tensor]:
        return {"buffer": torch.full((2,), float(replica))}

    def engine_state(self, replica: int) -> EngineState:
        return EngineState(4, 8, 0, {"last": 3}, [{"betas": (0.9, 0.99), "lr": 0.1}], {}, {"samples": replica})


def test_between_syncs_the_mean_is_taken_and_nothing_is_lost_of_the_movement() -> None:
    run = MemoryRun()
    for replicas in (1, 3, 4):
        new = ReshapedRun(run, replicas)
        for m in range(replicas):
            state = new.state("w", m)
            torch.testing.assert_close(state["weight"], run.states["w", 0]["anchor"] + 0.5)
            assert torch.equal(state["anchor"], run.states["w", 0]["anchor"])
            if replicas > 1:
                assert torch.equal(state["error"], run.states["w", m % 2]["error"])
    merged = ReshapedRun(run, 1).state("w", 0)
    torch.testing.assert_close(merged["error"], (run.states["w", 0]["error"] + run.states["w", 1]["error"]) / 2)
    corrected = [run.states["w", m]["exp_avg"] / (1 - 0.9 ** (4 - m)) for m in range(2)]
    torch.testing.assert_close(merged["exp_avg"] / (1 - 0.9**4), (corrected[0] + corrected[1]) / 2)
    assert merged["step"] == 4
    # The schedule comes from the replica that executed most, as the count of steps does.
    run.counters = lambda replica: Counters(attempted_steps=4, executed_steps=2 + replica, syncs=1, last_synced_step=3)  # type: ignore[method-assign]
    one = ReshapedRun(run, 1)
    assert (one.counters(0).executed_steps, one.engine_state(0).client_state) == (3, {"samples": 1})
    assert torch.equal(ReshapedRun(run, 2).state("w", 1)["weight"], run.states["w", 1]["weight"])


def test_at_a_sync_every_count_of_replicas_starts_from_the_same_weights_exactly() -> None:
    run = MemoryRun(replicas=3, synced=True)
    for replicas in (1, 2, 3, 7):
        new = ReshapedRun(run, replicas)
        assert not new.notes
        assert all(torch.equal(new.state("w", m)["weight"], run.states["w", 0]["weight"]) for m in range(replicas))


def test_a_replica_that_is_not_finite_is_left_out_of_the_mean() -> None:
    run = MemoryRun(replicas=3)
    run.states["w", 1]["weight"] = torch.full((6, 4), float("nan"))
    new = ReshapedRun(run, 1)
    torch.testing.assert_close(new.state("w", 0)["weight"], run.states["w", 0]["anchor"] + 1.0)
    assert "replicas whose weights are not finite were left out of it" in new.notes
    for m in (0, 2):
        run.states["w", m]["weight"] = torch.full((6, 4), float("inf"))
    with pytest.raises(CheckpointError, match="no replica's weights are finite"):
        ReshapedRun(run, 1)
    ReshapedRun(run, 3)  # the same replicas go on from whatever they have


def test_replicas_with_bases_of_their_own_are_not_averaged_in_them() -> None:
    run = MemoryRun()
    other = run.states["w", 1]
    other["basis"] = torch.linalg.qr(torch.randn(4, 2)).Q
    merged = mean_state([run.state("w", 0), run.state("w", 1)], (0.9, 0.99))
    assert torch.equal(merged["exp_avg"], run.states["w", 0]["exp_avg"])
    assert torch.equal(merged["basis"], run.states["w", 0]["basis"])


def test_the_rank_shrinks_to_the_leading_columns_and_grows_by_orthonormal_ones() -> None:
    state, parameter = MemoryRun().state("w", 0), MemoryRun().parameters["w"]
    smaller = with_rank(state, SavedParameter("w", (6, 4), True, "columns", 1))
    assert torch.equal(smaller["basis"], state["basis"][:, :1]) and torch.equal(
        smaller["exp_avg"], state["exp_avg"][:1]
    )
    larger = with_rank(state, SavedParameter("w", (6, 4), True, "columns", 4))
    torch.testing.assert_close(larger["basis"].T @ larger["basis"], torch.eye(4))
    assert torch.equal(larger["basis"][:, :2], state["basis"])
    assert torch.equal(larger["exp_avg"][2:], torch.zeros(2, 6))
    torch.testing.assert_close(larger["exp_avg_sq"][3], state["exp_avg_sq"].mean(0))
    assert with_rank(state, parameter) is state
    fresh = {**state, "has_basis": False, "basis": torch.zeros(4, 2)}
    grown = with_rank(fresh, SavedParameter("w", (6, 4), True, "columns", 3))
    assert torch.equal(grown["basis"], torch.zeros(4, 3)) and not grown["has_basis"]


# -- portable checkpoints ----------------------------------------------------------------------------


def test_a_portable_checkpoint_holds_what_was_written(tmp_path: Path) -> None:
    run = MemoryRun()
    write_portable(run, tmp_path / "p")
    found = open_run(tmp_path / "p")
    shared, own = (TensorFile(tmp_path / "p" / f"{name}.safetensors") for name in ("shared", "replica_1"))
    assert set(shared.entries) == {"w:anchor", "w:basis", "b:anchor"} and "w:weight" in own.entries
    assert found.rows() == [[1.5]] and not found.synced and found.settings == run.settings
    for m in range(2):
        assert found.counters(m) == run.counters(m) and found.engine_state(m) == run.engine_state(m)
        assert torch.equal(found.untrained(m)["buffer"], run.untrained(m)["buffer"])
        for name in run.parameters:
            found.check_state(name, m)
            one, other = run.state(name, m), found.state(name, m)
            assert one.keys() == other.keys()
            assert all(torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k] for k, v in one.items())
    write_portable(found, tmp_path / "p")  # over itself: read before the other is removed
    assert torch.equal(open_run(tmp_path / "p").state("w", 1)["error"], run.states["w", 1]["error"])


def test_a_checkpoint_is_opened_by_any_path_that_leads_to_it(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """`Path(".").name` is empty, that of `x/..` is `..`: siblings (`.old`, `.part`) are named after the directory."""
    home = tmp_path / "a folder"
    write_portable(MemoryRun(), home / "kept one" / "p")
    (home / "kept one" / "p" / "sub").mkdir()
    (home / "link").symlink_to("kept one/p")
    (home / "up").symlink_to("kept one/p/sub")
    monkeypatch.chdir(home)
    paths = ["link", "link/", "up/..", "kept one/p/", "kept one/p/sub/..", "./kept one/./p", str(home / "link")]
    for path in paths:
        assert main(["ckpt", "show", path]) == 0, capsys.readouterr().err
    for tag in ("p", "p/"):
        assert main(["ckpt", "show", "kept one", "--tag", tag]) == 0, capsys.readouterr().err
    monkeypatch.chdir(home / "kept one" / "p")
    for path in (".", "./", "", "../p", "sub/.."):
        assert main(["ckpt", "show", path]) == 0, capsys.readouterr().err
    assert main(["ckpt", "export", ".", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert main(["ckpt", "show", "..", "--tag", "p"]) == 0, capsys.readouterr().err
    assert TensorFile(tmp_path / "out" / "model.safetensors").metadata["source"].startswith("p, mean of replicas")


def test_a_destination_has_a_name_of_its_own(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    write_portable(MemoryRun(), tmp_path / "p")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("empty/sub")
    monkeypatch.chdir(tmp_path / "empty" / "sub")
    assert main(["ckpt", "export", str(tmp_path / "p"), "."]) == 1
    assert "is the directory that you are in: give another destination" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    for command in ("export", "reshape"):
        for destination in (f"empty/sub/../{command}", f"link/../{command}2", f"{command} 3/"):
            assert main(["ckpt", command, "p", destination]) == 0, capsys.readouterr().err
    assert main(["ckpt", "export", "p", "empty/sub/.."]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.old"))


@given(st.data())
@FUZZ
def test_a_changed_byte_of_a_portable_checkpoint_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """Without the sums of the whole files, which would refuse them all: the readers hold up by themselves."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        write_portable(MemoryRun(), folder)
    name = data.draw(st.sampled_from(["manifest.json", COMPLETE, "shared.safetensors", "replica_0.safetensors"]))
    original = (folder / name).read_bytes()
    changed = bytearray(original)
    if data.draw(st.booleans()):
        changed = changed[: data.draw(st.integers(0, len(changed) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(changed)
    try:
        with pytest.raises(CheckpointError):
            open_run(folder)
        run = PortableRun(folder)
        for parameter in run.parameters:
            for m in range(run.replicas):
                run.check_state(parameter, m)
    except CheckpointError as error:
        assert str(error).startswith("LoRDO: ") and "\n" not in str(error)
    except pytest.fail.Exception:
        assert bytes(changed) == original or name == COMPLETE, "opened in spite of a changed file"
    finally:
        (folder / name).write_bytes(original)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(replicas=10**12), "does not list every replica's values"),
        (lambda m: m.update(replicas=10**30), "is damaged: replicas: "),
        (lambda m: m["parameters"][0].update(shape=[10**12, 4]), "the weight of w is missing or damaged"),
        (
            lambda m: m["parameters"][0].update(shape=[2**40, 2**40]),
            "is damaged: parameters.0.shape: .*so many elements",
        ),
        (lambda m: m["parameters"][0].update(rank=10**12), "'basis' of w is|of w is .*damaged"),
        (lambda m: m["parameters"][0].update(rank=-1), "is damaged: parameters.0.rank"),
        (lambda m: m["values"]["w"][0].update(step=10**30), "is damaged: values.w.0.step"),
        (lambda m: m["values"]["w"][0].update(weight=1), "the weight of w is missing or damaged"),
        (lambda m: m["sums"].update({"../../elsewhere": {}}), "is damaged: its sums are of other files"),
        (lambda m: m["settings"].update(deep=json.loads("[" * 50 + "]" * 50)), "nested deeper than"),
    ],
)
def test_no_count_in_a_manifest_is_believed_beyond_what_its_files_hold(tmp_path: Path, change: Any, words: str) -> None:
    write_portable(MemoryRun(), tmp_path / "p")
    path = tmp_path / "p" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    (tmp_path / "p" / COMPLETE).write_text(json.dumps({"format": 1, "files": {}}))
    with pytest.raises(CheckpointError, match=words):
        run = PortableRun(tmp_path / "p")
        for name in run.parameters:
            run.check_state(name, 0)


def test_tensors_that_lie_over_one_another_are_refused(tmp_path: Path) -> None:
    """Each of a million names could be all of the file."""
    with TensorWriter(tmp_path / "f", ["a", "b"]) as writer:
        writer.add("a", torch.zeros(100))
        writer.add("b", torch.zeros(100))
    data = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(data.replace(b"[0, 400]", b"[0, 800]").replace(b"[100]", b"[200]", 1))
    with pytest.raises(CheckpointError, match="its tensors are more than it holds"):
        TensorFile(tmp_path / "f")


# -- files -------------------------------------------------------------------------------------------


def test_tensor_files_are_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.arange(3), "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 4), "flag": torch.tensor([True, False]), "transposed": torch.randn(3, 2).T,
    }  # fmt: skip
    with TensorWriter(tmp_path / "f.safetensors", list(tensors), {"source": "test"}) as writer:
        sums = {name: writer.add(name, tensor) for name, tensor in tensors.items()}
    file = TensorFile(tmp_path / "f.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor) and file.read(name).dtype == tensor.dtype
        assert file.crc(name) == sums[name]
    assert file.metadata == {"source": "test"}
    torch_files = pytest.importorskip("safetensors.torch", reason="the format's own library is not installed")
    loaded = torch_files.load_file(tmp_path / "f.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    torch_files.save_file({"x": torch.ones(2, 3)}, tmp_path / "g.safetensors")
    assert torch.equal(TensorFile(tmp_path / "g.safetensors").read("x"), torch.ones(2, 3))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "x") as part:
        (part / "file").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    for text in ("one", "two"):
        with whole_folder(tmp_path / "x") as part:
            (part / "file").write_text(text)
        assert (tmp_path / "x" / "file").read_text() == text and set(read_complete(tmp_path / "x").files) == {"file"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("text", ["", "../elsewhere", "/etc"])
def test_latest_must_name_a_directory_beside_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "latest").write_text(text)
    with pytest.raises(CheckpointError, match="which is no tag"):
        find_tag(tmp_path, None)
    assert find_tag(tmp_path, "given") == "given"


def test_complete_json_cannot_point_outside(tmp_path: Path) -> None:
    (tmp_path / COMPLETE).write_text(json.dumps({"format": 1, "files": {"../x": [1, 2]}}))
    with pytest.raises(CheckpointError, match="damaged: it lists"):
        read_complete(tmp_path)


@given(st.data())
@FUZZ
def test_a_damaged_torch_file_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    torch.save({"state": {0: torch.arange(20.0)}, "plain": ["a", 1, None]}, path)
    changed = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        changed = changed[: data.draw(st.integers(0, len(changed) - 1))]
    else:
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    try:
        read_saved(path)  # a flip inside a tensor is for the sums to find
    except CheckpointError as error:
        assert str(error).startswith("LoRDO: ") and "\n" not in str(error)


PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=5)


@given(st.recursive(PLAIN, lambda one: st.lists(one) | st.dictionaries(st.text(max_size=5), one), max_leaves=8))
def test_a_header_of_anything_is_refused(value: Any) -> None:
    for state in (value, {"lordo": value}, {"lordo": {"format": 2, "mesh": value}}):
        with pytest.raises(CheckpointError):
            Header.of(state, "it")


# -- generators --------------------------------------------------------------------------------------


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draws() -> tuple[Any, ...]:
        return random.random(), float(np.random.rand()), torch.rand(3).tolist(), random.gauss(0, 1), np.random.randn()

    draws()
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = draws(), draws()
    set_rng_state(read_saved(tmp_path / "rng.pt", classes={}))
    assert (draws(), draws()) == expected
    set_rng_state({})
