"""Text to tokens: strict reading, a lossless tokenizer, Megatron's file format, a shared cache."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from lordo_ds.data import DataError, prepare, unigram_entropy
from lordo_ds.data import cache as cache_module
from lordo_ds.data.cache import build_once, default_cache, remembered_digest
from lordo_ds.data.corpus import TEXT_DOCUMENT_CHARS, EmbeddedCorpus, FileCorpus
from lordo_ds.data.indexed import read_lengths, token_dtype, write_indexed
from lordo_ds.data.tokenizer import EOD, PAD, UNK, Tokenizer, train_tokenizer

WORDS = ["the", "replica", "averages", "weights", "and", "keeps", "an", "anchor", "of", "every", "matrix"]


def some_text(documents: int = 40, words: int = 120) -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, words)) + "\n" for _ in range(documents)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(some_text())))
    return path


def one_by_one(documents: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((np.array([len(tokens)]), tokens) for tokens in documents)


def quiet(_: str) -> None:
    pass


# -- reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "a.jsonl",
            b'{"text": "one"}\n{"text": "two"\n',
            "a.jsonl: line 2: not JSON (Expecting ',' delimiter",
        ),
        ("a.jsonl", b'{"text": "one"}\n\n["two"]\n', "a.jsonl: line 3: a JSON list, not an object"),
        ("a.jsonl", b'{"body": "one", "id": 3}\n', "a.jsonl: line 1: no key \"text\" (keys: 'body', 'id')"),
        ("a.jsonl", b'{"text": 5}\n', 'a.jsonl: line 1: "text" is a int, not a string'),
        ("a.txt", b"fine\nna\xefve\n", "a.txt: line 2: byte 3 (0xef) is not UTF-8"),
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b"  \n\n", "a.txt: holds only white space"),
    ],
)
def test_bad_text_is_reported_in_one_line_with_its_place(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare([path], 512, tmp_path / "cache", quiet)
    message = str(caught.value)
    assert told in message and str(tmp_path) in message and "\n" not in message
    assert not list((tmp_path / "cache").glob("data-*/")), "a failed build left something behind"


def test_a_missing_file_and_a_folder_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.txt: no such file; --data takes"):
        prepare([tmp_path / "nowhere.txt"])
    with pytest.raises(DataError, match=r"not a file; name the files inside it"):
        prepare([tmp_path])


def test_an_unusable_cache_folder_is_reported_with_the_variable_that_moves_it(tmp_path: Path, jsonl: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    with pytest.raises(DataError, match="LORDO_CACHE"):
        prepare([jsonl], 512, in_the_way / "cache", quiet)


def test_a_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraph = "word " * 400 + "\n\n"
    path.write_text("\ufeff" + paragraph * 60, encoding="utf-8")
    documents = list(FileCorpus((path,)).documents())
    assert "".join(documents) == paragraph * 60
    assert len(documents) > 5
    assert all(text.endswith("\n\n") for text in documents[:-1])
    assert max(map(len, documents)) <= TEXT_DOCUMENT_CHARS + len(paragraph)


def test_the_embedded_corpus_is_megabytes_of_text_without_tests_and_always_the_same() -> None:
    corpus = EmbeddedCorpus()
    first, second = list(corpus.documents()), list(corpus.documents())
    assert first == second
    assert 5e6 < sum(map(len, first)) < 15e6
    assert not any("site-packages" in str(path) or "/test/" in str(path) for path in corpus._sources())


# -- tokens ------------------------------------------------------------------------------------------


def test_tokenizer_is_lossless_knows_every_character_and_trains_the_same_twice(tmp_path: Path) -> None:
    documents = [
        *some_text(),
        "def f(x):\n\treturn {\n        'a': x,\r\n    }\n",
        "naïve 漢字 \U0001f600 \0 <eod>",
    ]
    model = train_tokenizer(documents, 600)
    assert model == train_tokenizer(documents, 600)
    (tmp_path / "sp.model").write_bytes(model)
    tokenizer = Tokenizer(tmp_path / "sp.model")
    for text in [*documents, "ÿ unseen ЖЖЖ 12345   \n\n"]:
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text
        assert not {UNK, EOD, PAD} & set(ids)
    assert (tokenizer.eod, tokenizer.pad) == (EOD, PAD)
    assert tokenizer.vocab_size <= 600


@pytest.mark.parametrize(("eos", "pad"), [(2, -1), (5, 3), (-1, 3)])
def test_a_model_that_somebody_else_trained_serves_if_it_ends_documents(tmp_path: Path, eos: int, pad: int) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(some_text()), model_prefix=str(tmp_path / "m"), vocab_size=60, hard_vocab_limit=False,
        unk_id=0, bos_id=1, eos_id=eos, pad_id=pad, minloglevel=2,
    )  # fmt: skip
    if eos < 0:
        with pytest.raises(
            DataError, match=r"m.model: has no piece that ends a document \(eos_id is -1\); train it with"
        ):
            Tokenizer(tmp_path / "m.model")
    else:
        tokenizer = Tokenizer(tmp_path / "m.model")
        assert (tokenizer.eod, tokenizer.pad) == (eos, pad)
        assert not {eos, pad} & set(tokenizer.tokenize("the replica averages"))


@pytest.mark.parametrize("vocab_size", [0, 300, 511])
def test_a_vocabulary_below_the_bytes_is_refused(tmp_path: Path, jsonl: Path, vocab_size: int) -> None:
    with pytest.raises(DataError, match=f"vocab_size {vocab_size}: must be at least 512"):
        prepare([jsonl], vocab_size, tmp_path / "cache", quiet)


def test_a_vocabulary_below_the_texts_characters_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("\n".join(chr(0x4E00 + i) * 3 for i in range(3000)), encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot train 600 pieces .* vocab_size higher"):
        prepare([path], 600, tmp_path / "cache", quiet)


@pytest.mark.parametrize("vocab_size", [4096, 65_536, 65_537, 200_000])
def test_index_files_give_back_every_document_shuffled(tmp_path: Path, vocab_size: int) -> None:
    generator = np.random.default_rng(1)
    documents = [generator.integers(0, vocab_size, size) for size in (3, 1, 7, 2, 12)]
    dtype = token_dtype(vocab_size)
    assert dtype.itemsize == (2 if vocab_size <= 65_536 else 4)
    assert write_indexed(tmp_path / "t", one_by_one(documents), dtype, seed=0) == (5, 25)
    lengths, found = read_lengths(tmp_path / "t")
    assert found == dtype
    written = np.split(np.fromfile(tmp_path / "t.bin", dtype), np.cumsum(lengths)[:-1])
    assert sorted(map(tuple, written)) == sorted(map(tuple, documents))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.bin", "t.idx"]


@pytest.mark.megatron
def test_megatron_reads_the_index_files_as_its_own(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    documents = [np.arange(start, start + size) for start, size in ((0, 5), (100, 1), (7, 30))]
    write_indexed(tmp_path / "ours", one_by_one(documents), token_dtype(4096), seed=0)
    ours = IndexedDataset(str(tmp_path / "ours"))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for i in range(len(ours)):
        builder.add_document(torch.tensor(ours[i].astype(np.int64)), [len(ours[i])])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert sorted(map(tuple, (ours[i] for i in range(3)))) == sorted(map(tuple, documents))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_prepared_documents_end_with_eod_and_decode_to_the_text(tmp_path: Path, jsonl: Path) -> None:
    data = prepare([jsonl], 600, tmp_path / "cache", quiet)
    lengths, dtype = read_lengths(data.prefix)
    tokens = np.fromfile(data.prefix.with_suffix(".bin"), dtype)
    assert len(tokens) == data.tokens == lengths.sum()
    assert data.documents == len(lengths) == 40
    tokenizer = data.tokenizer()
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    assert all(part[-1] == tokenizer.eod and tokenizer.eod not in part[:-1] for part in parts)
    assert sorted(tokenizer.detokenize(part[:-1]) for part in parts) == sorted(some_text())
    assert data.text_bytes == sum(len(text.encode()) for text in some_text())


def test_the_holdout_is_the_asked_share_of_whole_documents(tmp_path: Path, jsonl: Path) -> None:
    data = prepare([jsonl], 600, tmp_path / "cache", quiet)
    assert data.held_out(0.05) == pytest.approx(0.05 * 40, abs=1)
    held = data.held_out(0.05, min_tokens=data.tokens // 3)
    assert data.tokens // 3 <= len(data.validation_tokens(held)) <= data.tokens // 2
    with pytest.raises(DataError, match="give more text"):
        data.held_out(min_tokens=data.tokens)


def test_unigram_entropy_is_that_of_the_frequencies() -> None:
    assert unigram_entropy(np.array([4, 4, 4, 4])) == 0
    assert unigram_entropy(np.arange(32, dtype=np.uint16)) == pytest.approx(math.log(32))
    assert unigram_entropy(np.array([0, 1, 1, 1])) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


# -- the cache ---------------------------------------------------------------------------------------


def test_what_decides_the_tokens_decides_the_key(tmp_path: Path, jsonl: Path) -> None:
    cache = tmp_path / "cache"
    first = prepare([jsonl], 600, cache, quiet)
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(jsonl.read_bytes())
    assert prepare([moved], 600, cache, quiet) == first
    assert prepare([jsonl], 620, cache, quiet).key != first.key
    jsonl.write_text(jsonl.read_text() + '{"text": "one more document"}\n')
    assert prepare([jsonl], 600, cache, quiet).key != first.key


def test_the_cache_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORDO_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("LORDO_CACHE")
    assert default_cache() == Path.home() / ".cache" / "lordo_ds"


def build_slowly(target: Path, log: Path) -> None:
    def build(folder: Path) -> None:
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        (folder / "half").write_text("half")
        time.sleep(0.3)
        (folder / "whole").write_text("whole")

    build_once(target, build, quiet)
    assert (target / "whole").exists()


def test_one_process_builds_and_the_others_wait_for_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    processes = [context.Process(target=build_slowly, args=(tmp_path / "data", log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(log.read_text().splitlines()) == 1


def test_a_killed_builder_leaves_nothing_that_counts_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    target, log = tmp_path / "data", tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(target=build_slowly, args=(target, log))
    process.start()
    deadline = time.monotonic() + 10
    while not list(tmp_path.glob("data.tmp-*/half")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=10)
    assert not target.exists()
    assert list(tmp_path.glob("data.tmp-*"))
    build_slowly(target, log)
    assert not list(tmp_path.glob("data.tmp-*"))


def test_a_failed_build_is_tried_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise DataError("no")

    with pytest.raises(DataError):
        build_once(tmp_path / "data", fail, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["data.lock"]
    build_slowly(tmp_path / "data", tmp_path / "log")


def test_a_build_under_way_on_another_machine_is_left_alone(tmp_path: Path) -> None:
    """Where locks end at the machine; whoever is later takes what is there."""
    other = tmp_path / "data.tmp-another-host-17"
    other.mkdir()

    def build(folder: Path) -> None:
        (folder / "whole").write_text("mine")
        other.rename(tmp_path / "data")
        (tmp_path / "data" / "whole").write_text("the other's")

    assert (build_once(tmp_path / "data", build, quiet) / "whole").read_text() == "the other's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.lock"]


def test_a_file_system_without_locks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(cache_module.fcntl, "flock", no_locks)
    with pytest.raises(DataError, match=r"no file locks .* set LORDO_CACHE"):
        build_once(tmp_path / "data", lambda folder: None, quiet)


def test_a_large_file_is_read_whole_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache_module, "REMEMBERED_BYTES", 4)
    read: list[Path] = []
    whole = cache_module.content_digest
    monkeypatch.setattr(cache_module, "content_digest", lambda path: (read.append(path), whole(path))[1])
    text = tmp_path / "text"
    text.write_text("some text")
    first = remembered_digest(text, tmp_path, quiet)
    assert first == remembered_digest(text, tmp_path, quiet) == whole(text) and len(read) == 1
    text.write_text("more text")  # of the same length
    os.utime(text, ns=(1, 1))
    assert remembered_digest(text, tmp_path, quiet) == whole(text) != first and len(read) == 2
