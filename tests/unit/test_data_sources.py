"""What `lordo data` reads: divided without loss, and refused with the place and the way out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from lordo_ds.data.corpus import DataError, FileCorpus
from lordo_ds.data.sources import open_sources
from lordo_ds.data.units import Source, digest

LINES = st.lists(st.sampled_from(["", "a", "long " * 30, "ünïcode 漢字", "  ", "\r"]), min_size=1, max_size=40)


def documents(source: Source, unit_bytes: int) -> list[str]:
    return [text for unit in source.units(unit_bytes) for text in source.documents(unit)]


@hypothesis.given(LINES, st.integers(1, 200), st.booleans())
@hypothesis.settings(max_examples=150)
def test_units_of_text_are_whole_lines_and_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], unit_bytes: int, ended: bool
) -> None:
    path = tmp_path_factory.mktemp("units") / "a.txt"
    path.write_bytes(("\n".join(lines) + "\n" * ended + "x").encode())
    (source,) = open_sources([str(path)])
    units = source.units(unit_bytes)
    assert units[0].start == 0 and units[-1].stop == path.stat().st_size
    assert [unit.stop for unit in units[:-1]] == [unit.start for unit in units[1:]]
    raw = path.read_bytes()
    assert all(raw[unit.stop - 1 : unit.stop] == b"\n" for unit in units[:-1])
    whole = [text for text in documents(source, unit_bytes)]
    # Documents of white space alone are left out; all else is there, in its order.
    assert "".join("".join(whole).split()) == "".join(raw.decode().split())


def test_text_is_divided_at_blank_lines_where_there_are_some(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(("word " * 20 + "\n" + "word " * 20 + "\n\n") * 500)
    (source,) = open_sources([str(path)])
    units = source.units(5000)
    raw = path.read_bytes()
    assert len(units) > 10 and all(raw[: unit.stop].endswith(b"\n\n") for unit in units)


@pytest.mark.parametrize("unit_bytes", [1, 50, 333, 10**6])
def test_units_of_jsonl_give_the_records_of_the_file(tmp_path: Path, unit_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "".join(json.dumps({"text": f"{'x' * (n % 70)} {n}"}) + "\n" for n in range(300)))
    (source,) = open_sources([str(path)])
    assert documents(source, unit_bytes) == list(FileCorpus((path,)).documents())
    assert len(documents(source, unit_bytes)) == 300


def test_the_key_names_where_the_text_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "this", "text": "not this"}\n')
    assert documents(open_sources([str(path)], "content")[0], 100) == ["this"]
    with pytest.raises(
        DataError, match=r"line 1: no key \"body\" \(keys: 'content', 'text'\); .* \{\"body\": \"...\"\}"
    ):
        documents(open_sources([str(path)], "body")[0], 100)


@pytest.mark.parametrize(
    ("name", "bad", "told"),
    [
        ("a.jsonl", b"oops\n", "a.jsonl: line 201: not JSON"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', 'a.jsonl: line 201: "text" has half a surrogate pair (\\ud83d)'),
        ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl: line 201: not JSON"),
        ("a.txt", b"na\xefve\n", "a.txt: line 201: byte 3 (0xef) is not UTF-8"),
    ],
)
@pytest.mark.parametrize("unit_bytes", [64, 10**9])
def test_an_error_names_the_line_of_the_file_in_whatever_unit(
    tmp_path: Path, name: str, bad: bytes, told: str, unit_bytes: int
) -> None:
    path = tmp_path / name
    good = b'{"text": "good"}\n' if name.endswith("l") else b"good\n"
    path.write_bytes(good * 200 + bad + good * 200)
    (source,) = open_sources([str(path)])
    with pytest.raises(DataError) as caught:
        documents(source, unit_bytes)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere.txt", r"nowhere.txt: no such file; a dataset .* hf:OWNER/NAME"),
        (".", "not a file; name the files inside it"),
        ("a.jsonl.gz", "a packed file .* unpack it first"),
        ("empty.txt", "the file is empty"),
        ("hf:", "hf:: a dataset is given as hf:OWNER/NAME"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=told):
        open_sources([name if name.startswith("hf:") else str(tmp_path / name)])


# -- parquet -----------------------------------------------------------------------------------------


def write_parquet(path: Path, texts: list[str | None], group: int = 10, column: str = "text") -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[data]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(len(texts))), column: pyarrow.array(texts, pyarrow.string())})
    parquet.write_table(table, path, row_group_size=group)


@pytest.mark.parametrize("unit_bytes", [1, 300, 10**6])
def test_parquet_gives_its_rows_in_order(tmp_path: Path, unit_bytes: int) -> None:
    texts = [f"{'x' * (n % 7)} {n}" for n in range(95)]
    write_parquet(tmp_path / "a.parquet", [*texts, "  "])
    (source,) = open_sources([str(tmp_path / "a.parquet")])
    units = source.units(unit_bytes)
    assert len(units) == {1: 10, 10**6: 1}.get(unit_bytes, len(units))
    assert documents(source, unit_bytes) == texts


def test_parquet_that_cannot_be_used_is_refused_with_its_place(tmp_path: Path) -> None:
    write_parquet(tmp_path / "null.parquet", [*["good"] * 25, None])
    with pytest.raises(DataError, match=r"null.parquet: row 26: text is empty \(null\), not a string"):
        documents(open_sources([str(tmp_path / "null.parquet")])[0], 1)
    write_parquet(tmp_path / "other.parquet", ["good"], column="body")
    with pytest.raises(DataError, match=r"no column text of strings \(columns: id \(int64\), body \(string\)\); --key"):
        open_sources([str(tmp_path / "other.parquet")])[0].units(1)
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"no.parquet: not a parquet file"):
        open_sources([str(tmp_path / "no.parquet")])[0].units(1)
    write_parquet(tmp_path / "torn.parquet", [f"{n} " * 50 for n in range(100)])
    raw = bytearray((tmp_path / "torn.parquet").read_bytes())
    raw[200:1200] = bytes(1000)
    (tmp_path / "torn.parquet").write_bytes(raw)
    with pytest.raises(DataError, match=r"torn.parquet: row groups 0 to .* damaged"):
        documents(open_sources([str(tmp_path / "torn.parquet")])[0], 10**9)


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("hf:owner/name", "datasets")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"need.* {package}.*: pip install 'lordo_ds\[data\]'"):
        open_sources([name if ":" in name else str(tmp_path / name)])[0].units(1)


# -- the Hub -----------------------------------------------------------------------------------------


class Dataset:
    """As much of `datasets.Dataset` as is used."""

    def __init__(self, columns: dict[str, list[Any]], file: Path) -> None:
        self.columns, self.cache_files = columns, [{"filename": str(file)}]
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: slice) -> dict[str, list[Any]]:
        return {name: values[rows] for name, values in self.columns.items()}

    def select_columns(self, names: list[str]) -> Dataset:
        return Dataset({name: self.columns[name] for name in names}, Path(self.cache_files[0]["filename"]))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Plays the package `datasets`; what it is asked for."""
    asked: list[tuple[Any, ...]] = []
    (tmp_path / "rows.arrow").write_bytes(b"x" * 5000)

    def load_dataset(path: str, config: str | None, split: str) -> Dataset:
        asked.append((path, config, split))
        if path == "no/where":
            raise ConnectionError("no\nnetwork")
        return Dataset(
            {"id": list(range(50)), "text": [*(f"row {n}" for n in range(49)), None]}, tmp_path / "rows.arrow"
        )

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_dataset_of_the_hub_is_read_in_ranges_of_rows(hub: list[tuple[Any, ...]]) -> None:
    (source,) = open_sources(["hf:owner/name:config:train[:90%]"])
    assert hub == [("owner/name", "config", "train[:90%]")]
    units = source.units(1000)
    assert [(unit.start, unit.stop) for unit in units] == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 50)]
    assert [text for unit in units[:4] for text in source.documents(unit)] == [f"row {n}" for n in range(40)]
    with pytest.raises(DataError, match=r"hf:owner/name:config:train\[:90%\]: row 50: text is empty"):
        documents(source, 1000)
    assert len(digest(source)) == 64
    open_sources(["hf:owner/name", "hf:owner/name::test"])
    assert hub[1:] == [("owner/name", None, "train"), ("owner/name", None, "test")]


def test_a_dataset_that_cannot_be_had_is_refused_with_what_to_do(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(DataError, match=r"hf:no/where: datasets cannot load it \(no network\); check .* the network"):
        open_sources(["hf:no/where"])
    with pytest.raises(DataError, match=r"hf:owner/name: no column body \(columns: id, text\); --key"):
        open_sources(["hf:owner/name"], "body")
