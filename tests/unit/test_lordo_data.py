"""`lordo data`: the same bytes from any number of processes and after any interruption, and files that are checked."""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lordo_ds.cli.main import main
from lordo_ds.data import DataError, Tokenizer, build, prepare
from lordo_ds.data.build import Settings, make
from lordo_ds.data.corpus import FileCorpus
from lordo_ds.data.indexed import read_lengths
from lordo_ds.data.manifest import SUFFIXES, Manifest, data_path, manifest_path, read_manifest, verify
from lordo_ds.data.parts import first_of_each
from lordo_ds.data.sources import open_sources
from lordo_ds.data.workers import results_of
from tests.readme import commands as readme_commands

REPOSITORY = Path(__file__).resolve().parents[2]
UNIT_BYTES = 4000
WORDS = ["".join(word) for word in itertools.product("kmrst", "aeiou", ["l", "n", "nd"], ["a", "est", "ï"])]
MADE = (*SUFFIXES, ".manifest.json")


def some_texts(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, int(generator.integers(1, 80)))) + f" {n}\n" for n in range(count)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file, in which three documents come twice, and a text file."""
    home = tmp_path_factory.mktemp("sources")
    texts = some_texts(300)
    with (home / "a.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in [*texts, texts[7], texts[70], texts[7]])
    (home / "b.txt").write_text("\n".join(some_texts(200, seed=1)))
    return home


def made(home: Path, prefix: Path, **settings: Any) -> Manifest:
    sources = open_sources([str(home / "a.jsonl"), str(home / "b.txt")])
    given: dict[str, Any] = {"vocab_size": 600, "workers": 2, "unit_bytes": UNIT_BYTES, **settings}
    return make(sources, prefix, Settings(**given), say=lambda line: None, stream=io.StringIO())


@pytest.fixture(scope="module")
def reference(home: Path) -> Path:
    """Made in one go, by two processes."""
    made(home, home / "reference.v1")
    return home / "reference.v1"


def contents(prefix: Path) -> dict[str, str]:
    return {one: hashlib.sha256(data_path(prefix, one).read_bytes()).hexdigest() for one in MADE}


def texts_of(prefix: Path) -> list[str]:
    lengths, dtype = read_lengths(prefix)
    tokens = np.fromfile(data_path(prefix, ".bin"), dtype)
    tokenizer = Tokenizer(data_path(prefix, ".model"))
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    assert all(part[-1] == tokenizer.eod for part in parts)
    return [tokenizer.detokenize(part[:-1]) for part in parts]


# -- what is in the files ----------------------------------------------------------------------------


def test_the_files_hold_every_document_of_every_source(home: Path, reference: Path) -> None:
    manifest = read_manifest(reference)
    assert manifest.documents == manifest.sources[0].documents + manifest.sources[1].documents
    assert manifest.sources[0].documents == 303 and manifest.duplicates == 0
    expected = list(FileCorpus((home / "a.jsonl",)).documents())
    found = texts_of(reference)
    assert len(found) == manifest.documents and set(expected) < set(found)
    of_text = sorted(text for text in found if text not in set(expected))
    assert sorted("".join(of_text).split()) == sorted((home / "b.txt").read_text().split())
    assert found[:50] != expected[:50], "not shuffled"
    assert manifest.sources[0].sha256 == hashlib.sha256((home / "a.jsonl").read_bytes()).hexdigest()
    assert manifest.text_bytes == sum(len(text.encode()) for text in found)
    assert sorted(path.name for path in home.glob("reference*")) == sorted(f"reference.v1{one}" for one in MADE)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_processes_changes_no_byte(home: Path, reference: Path, tmp_path: Path, workers: int) -> None:
    made(home, tmp_path / "again", workers=workers)
    assert contents(tmp_path / "again") == contents(reference)


def test_another_tokenizer_text_or_vocabulary_gives_other_files(home: Path, reference: Path, tmp_path: Path) -> None:
    made(home, tmp_path / "given", tokenizer=data_path(reference, ".model"))
    made(home, tmp_path / "larger", vocab_size=620)
    given, larger, first = (contents(one) for one in (tmp_path / "given", tmp_path / "larger", reference))
    assert [given[one] == first[one] for one in SUFFIXES] == [True] * 3  # the same model, whoever trained it
    assert [larger[one] == first[one] for one in SUFFIXES] == [False] * 3


def test_a_document_that_is_there_already_is_left_out(home: Path, reference: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        manifest = made(home, tmp_path / f"once{workers}", dedup=True, workers=workers)
    assert contents(tmp_path / "once1") == contents(tmp_path / "once2")
    assert manifest.duplicates == 3 and manifest.documents == read_manifest(reference).documents - 3
    found = texts_of(tmp_path / "once1")
    assert len(set(found)) == len(found) and set(found) == set(texts_of(reference))


def test_the_first_of_equal_digests_is_kept() -> None:
    generator = np.random.default_rng(0)
    kinds = generator.integers(0, 256, (20, 16), np.uint8)
    kinds[1, :15] = kinds[0, :15]  # in either half, one byte decides
    kinds[2, 1:] = kinds[0, 1:]
    drawn = generator.integers(0, 20, 200)
    expected = [kind not in drawn[:at] for at, kind in enumerate(drawn)]
    assert first_of_each(kinds[drawn]).tolist() == expected
    assert first_of_each(np.zeros((0, 16), np.uint8)).tolist() == []


@pytest.mark.megatron
def test_megatron_reads_them(reference: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs = IndexedDataset(str(reference))
    lengths, dtype = read_lengths(reference)
    tokens = np.fromfile(data_path(reference, ".bin"), dtype)
    assert len(theirs) == len(lengths) and np.array_equal(
        np.concatenate([theirs[n] for n in range(len(theirs))]), tokens
    )
    assert len(theirs.document_indices) == len(lengths) + 1


@pytest.mark.megatron
def test_the_training_script_reads_them(home: Path, reference: Path, tmp_path: Path) -> None:
    from pretrain.text import open_datasets

    data = prepare([reference], 4096, tmp_path / "cache", lambda line: None)
    assert (data.documents, data.vocab_size) == (read_manifest(reference).documents, data.tokenizer().vocab_size)
    train, valid, held_out = open_datasets(data, 32, seed=1)
    assert len(train) > 100 and len(valid) > 0 and held_out > 0
    assert train[0]["tokens"].shape == (32,)
    assert sorted(path.name for path in home.glob("reference*")) == sorted(f"reference.v1{one}" for one in MADE)


def test_the_training_script_is_told_what_does_not_fit(home: Path, reference: Path, tmp_path: Path) -> None:
    pieces = read_manifest(reference).vocab_size
    with pytest.raises(
        DataError, match=rf"{pieces} pieces, more than the model's vocab_size {pieces - 1}: raise that, or"
    ):
        prepare([reference], pieces - 1, tmp_path)
    with pytest.raises(DataError, match="token files are given alone"):
        prepare([reference, home / "b.txt"], 4096, tmp_path)
    for one in SUFFIXES:
        data_path(tmp_path / "foreign", one).write_bytes(data_path(reference, one).read_bytes())
    with pytest.raises(DataError, match=r"foreign.manifest.json: no such file; lordo data makes it"):
        prepare([tmp_path / "foreign"], 4096, tmp_path)


# -- interrupted -------------------------------------------------------------------------------------

SLOWLY = """
import functools, sys, time
from lordo_ds.cli.main import main
from lordo_ds.data import build
build.Settings = functools.partial(build.Settings, unit_bytes=int(sys.argv[1]))
encoded = build.results_of
def slowly(*arguments):
    for result in encoded(*arguments):
        yield result
        time.sleep(0.2)
build.results_of = slowly
sys.exit(main(sys.argv[2:]))
"""


def command(home: Path, prefix: Path, *more: str) -> list[str]:
    sources = [str(home / "a.jsonl"), str(home / "b.txt")]
    return ["data", *sources, "--out", str(prefix), "--train-tokenizer", "600", "--workers", "2", *more]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_what_was_stopped_goes_on_to_the_same_bytes(
    home: Path, reference: Path, tmp_path: Path, signal_number: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    prefix = tmp_path / "stopped"
    parts = tmp_path / "stopped.parts"
    process = start_slowly(home, prefix)
    wait_for(lambda: len(list(parts.glob("*.part"))) >= 3 or process.poll() is not None)
    if signal_number == signal.SIGINT:
        os.killpg(process.pid, signal_number)  # as a terminal does
    else:
        process.kill()
    errors = process.communicate(timeout=120)[1]
    there = list(parts.glob("*.part"))
    assert there and not manifest_path(prefix).exists() and not data_path(prefix, ".bin").exists(), errors
    if signal_number == signal.SIGINT:
        assert process.returncode == 130 and "the same command goes on from here" in errors
        assert "Traceback" not in errors
    wait_for(lambda: not processes_of(process.pid))  # whoever worked for it has gone

    sources = open_sources([str(home / "a.jsonl"), str(home / "b.txt")])
    units = sum(len(source.units(UNIT_BYTES)) for source in sources)
    monkeypatch.setattr(build, "Settings", lambda **given: Settings(**given, unit_bytes=UNIT_BYTES))
    assert main(command(home, prefix)) == 0, capsys.readouterr().err
    assert f"going on: {len(there)} of {units} parts" in capsys.readouterr().out
    assert len(there) < units
    assert contents(prefix) == contents(reference)
    assert not parts.exists()


def start_slowly(home: Path, prefix: Path) -> subprocess.Popen[str]:
    """The command in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOWLY, str(UNIT_BYTES), *command(home, prefix)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_an_interrupt_while_the_processes_start_prints_no_traceback(home: Path, tmp_path: Path) -> None:
    process = start_slowly(home, tmp_path / "data")
    wait_for(lambda: any("forkserver" in command_of(one) for one in processes_of(process.pid)))
    time.sleep(0.3)  # it imports for seconds
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130, errors
    assert errors == "lordo: interrupted; the same command goes on from here\n"
    wait_for(lambda: not processes_of(process.pid))


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def processes_of(session: int) -> list[int]:
    """Living processes of a session; a dead one that nobody has waited for does not count."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(words[3]) == session and words[0] not in "ZX":
            found.append(int(entry.name))
    return found


@pytest.mark.parametrize("damage", ["cut", "bit", "other"])
def test_a_damaged_part_is_made_anew(home: Path, reference: Path, tmp_path: Path, damage: str) -> None:
    prefix = tmp_path / "data"

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "write_indexed", stop)
        made(home, prefix)
    parts = sorted((tmp_path / "data.parts").glob("*.part"))
    raw = bytearray(parts[1].read_bytes())
    if damage == "cut":
        del raw[-1]
    elif damage == "bit":
        raw[-1] ^= 1
    else:
        raw = bytearray(parts[2].read_bytes())
    parts[1].write_bytes(raw)
    encoded: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "results_of", lambda *given: counted(encoded, *given))
        made(home, prefix)
    assert encoded == [0], "one part, and no other"
    assert contents(prefix) == contents(reference)


def test_stopped_before_the_manifest_it_is_not_complete(home: Path, reference: Path, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "write_manifest", stop)
        made(home, tmp_path / "data")
    assert data_path(tmp_path / "data", ".bin").exists() and not manifest_path(tmp_path / "data").exists()
    with pytest.MonkeyPatch.context() as patch:
        encoded: list[int] = []
        patch.setattr(build, "results_of", lambda *given: counted(encoded, *given))
        made(home, tmp_path / "data")
    assert encoded == [] and contents(tmp_path / "data") == contents(reference)


def counted(numbers: list[int], *given: Any) -> Any:
    for number, result in results_of(*given):
        numbers.append(number)
        yield number, result


def test_a_source_that_changes_in_the_meantime_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "growing.txt"
    path.write_text("\n\n".join(some_texts(100)))

    def grow(*given: Any) -> Any:
        yield from results_of(*given)
        with path.open("a") as stream:
            stream.write("more")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match=r"growing.txt: has changed while"):
        patch.setattr(build, "results_of", grow)
        settings = Settings(vocab_size=600, workers=1)
        make(open_sources([str(path)]), tmp_path / "data", settings, lambda line: None, io.StringIO())
    assert not data_path(tmp_path / "data", ".bin").exists()


# -- what lies there already -------------------------------------------------------------------------


def test_what_is_complete_is_left_alone(home: Path, reference: Path) -> None:
    before = {one: data_path(reference, one).stat().st_mtime_ns for one in MADE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "results_of", None)
        made(home, reference, workers=1)
    assert before == {one: data_path(reference, one).stat().st_mtime_ns for one in MADE}
    assert not data_path(reference, ".parts").exists()


def test_files_of_other_text_or_of_somebody_else_are_not_overwritten(
    home: Path, reference: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"manifest.json: made of other text or with other settings; give another --out"
    ):
        made(home, reference, vocab_size=700)
    assert not data_path(reference, ".parts").exists()
    (tmp_path / "mine.bin").write_bytes(b"tokens")
    with pytest.raises(DataError, match=r"mine.bin: exists, and lordo data has not made it"):
        made(home, tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.bin"]
    (tmp_path / "other.parts").mkdir()
    (tmp_path / "other.parts" / "spare").touch()
    with pytest.raises(DataError, match=r"other.parts: exists, and lordo data has not made it"):
        made(home, tmp_path / "other")
    with pytest.raises(DataError, match="a folder; give the beginning of file names"):
        made(home, tmp_path)


def test_two_do_not_make_the_same_files_at_once(home: Path, tmp_path: Path) -> None:
    (tmp_path / "data.parts").mkdir()
    with (tmp_path / "data.parts" / "lordo.lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another lordo data is making it"):
            made(home, tmp_path / "data")
    assert made(home, tmp_path / "data").documents


# -- checked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", MADE)
def test_verify_finds_what_is_missing_cut_or_changed(reference: Path, tmp_path: Path, suffix: str, capsys: Any) -> None:
    prefix = tmp_path / "copy"
    for one in MADE:
        data_path(prefix, one).write_bytes(data_path(reference, one).read_bytes())
    assert main(["data", "verify", str(prefix)]) == 0
    assert "all checksums fit" in capsys.readouterr().out
    file = data_path(prefix, suffix)
    raw = bytearray(file.read_bytes())
    at = len(raw) // 2
    for damaged in (raw[:at], bytes([*raw[:at], raw[at] ^ 1, *raw[at + 1 :]]), None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert main(["data", "verify", str(prefix)]) == 1, damaged and len(damaged)
        assert str(file) in capsys.readouterr().err


def test_a_manifest_that_somebody_has_edited_is_refused(reference: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "copy"
    for one in MADE:
        data_path(prefix, one).write_bytes(data_path(reference, one).read_bytes())
    manifest_path(prefix).write_text(manifest_path(prefix).read_text().replace("a.jsonl", "c.jsonl"))
    with pytest.raises(DataError, match=r"copy.manifest.json: has changed since it was made"):
        verify(prefix)


def test_training_notices_another_tokenizer_and_a_damaged_index(reference: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "copy"
    for suffix, told in ((".model", r"copy.model: has changed"), (".idx", r"copy.idx: .* damaged")):
        for one in MADE:
            data_path(prefix, one).write_bytes(data_path(reference, one).read_bytes())
        raw = bytearray(data_path(prefix, suffix).read_bytes())
        raw[len(raw) // 2] ^= 1
        data_path(prefix, suffix).write_bytes(raw)
        with pytest.raises(DataError, match=told):
            prepare([prefix], 4096, tmp_path / "cache")


# -- processes ---------------------------------------------------------------------------------------


def task(kind: str) -> str:
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "divide":
        raise ZeroDivisionError
    if kind == "full":
        raise OSError(28, "No space left on device", "somewhere")
    return kind.upper()


def test_results_come_with_the_number_of_their_task() -> None:
    kinds = [f"task {n}" for n in range(7)]
    with closing(results_of(task, kinds, 3)) as results:
        assert sorted(results) == [(n, f"TASK {n}") for n in range(7)]
    assert list(results_of(task, [], 3)) == []


@pytest.mark.parametrize(
    ("kind", "error", "told"),
    [
        ("die", DataError, "a process ended by signal 9 in the middle of its work; .* fewer --workers"),
        ("divide", RuntimeError, "ZeroDivisionError"),
        ("full", OSError, "No space left on device: 'somewhere'"),
    ],
)
def test_what_goes_wrong_in_a_process_is_said(kind: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        list(results_of(task, ["fine", kind, "fine"], 1))


# -- the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a.txt"], "--out PREFIX is missing"),
        (["verify"], "lordo data verify takes one PREFIX"),
        (["verify", "a", "b"], "lordo data verify takes one PREFIX"),
        (["verify", "nowhere"], "nowhere.manifest.json: no such file; lordo data makes it"),
        (["a.txt", "--out", "x", "--workers", "0"], "--workers 0: must be at least 1"),
        (["a.txt", "--out", "x", "--train-tokenizer", "300"], "vocab_size 300: must be at least 512"),
        (["a.txt", "--out", "x", "--tokenizer", "none.model"], "--tokenizer none.model: no such file"),
        (["a.txt", "--out", "x", "--tokenizer", "a.txt"], "a.txt: not a sentencepiece model"),
        (["a.txt", "b.txt", "--out", "x"], "b.txt: holds only white space"),
        (["c.jsonl", "--out", "x", "--train-tokenizer", "600"], "c.jsonl: line 2: not JSON"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("\n\n".join(some_texts(30)))
    Path("b.txt").write_text(" \n \n")
    Path("c.jsonl").write_text('{"text": "one"}\n{"text: "two"}\n')
    assert main(["data", *arguments]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not list(tmp_path.glob("x.bin")) and not list(tmp_path.glob("x.manifest.json"))


def test_the_commands_in_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("corpus.jsonl", "new.jsonl")):
        Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in some_texts(60, seed)))
    Path("notes.txt").write_text("\n".join(some_texts(60, seed=2)))
    said = []
    for arguments in readme_commands("Text to token files", "lordo"):
        assert main(arguments) == 0, capsys.readouterr().err
        said.append(capsys.readouterr().out)
    assert "data/corpus: 61 documents" in said[0] and "tokens/s" in said[0] and "B/s" in said[0]
    assert "data/corpus: 61 documents" in said[1] and "all checksums fit" in said[1]
    assert "data/new: 60 documents (0 duplicates left out)" in said[2]
    assert sorted(path.name for path in Path("data").iterdir()) == sorted(
        f"{name}{suffix}" for name in ("corpus", "new") for suffix in MADE
    )


def test_sentencepiece_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("lordo_ds.cli.data.find_spec", lambda name: None)
    assert main(["data", "a.txt", "--out", "x"]) == 1
    assert "lordo data needs sentencepiece: pip install 'lordo_ds[data]'" in capsys.readouterr().err
