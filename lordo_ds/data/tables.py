"""Columns of strings: parquet files, and datasets of the Hugging Face Hub.

Neither pyarrow nor datasets is imported before it is needed; where one is missing the error says how to get it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lordo_ds.data.corpus import DataError
from lordo_ds.data.units import OneFile, Unit, size_bytes

HUB = "hf:"
_ROWS_AT_ONCE = 1024
_EXTRA = "pip install 'lordo_ds[data]'"

# -- parquet -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetFile(OneFile):
    """A parquet file with a column of strings; its units are whole row groups."""

    @property
    def kind(self) -> str:
        return f"parquet, column {self.key}"

    def _opened(self) -> Any:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DataError(f"{self.path}: parquet files need pyarrow: {_EXTRA}") from None
        try:
            opened = pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: not a parquet file ({_one_line(error)})") from None
        schema = opened.schema_arrow
        found = {name: str(schema.field(name).type) for name in schema.names}
        if found.get(self.key) not in ("string", "large_string", "string_view"):
            columns = ", ".join(f"{name} ({kind})" for name, kind in found.items())
            raise DataError(
                f"{self.path}: no column {self.key} of strings (columns: {columns}); --key names the column of the text"
            )
        return opened

    def units(self, unit_bytes: int) -> list[Unit]:
        with self._opened() as opened:
            sizes = [opened.metadata.row_group(group).total_byte_size for group in range(opened.num_row_groups)]
        units, start = [], 0
        for group in range(len(sizes)):
            size = sum(sizes[start : group + 1])
            if size >= unit_bytes or group + 1 == len(sizes):
                units.append(Unit(start, group + 1, size))
                start = group + 1
        return units

    def documents(self, unit: Unit) -> Iterator[str]:
        import pyarrow

        with self._opened() as opened:
            first = sum(opened.metadata.row_group(group).num_rows for group in range(unit.start))
            batches = opened.iter_batches(
                batch_size=_ROWS_AT_ONCE, row_groups=list(range(unit.start, unit.stop)), columns=[self.key]
            )
            try:
                values = (value for batch in batches for value in batch.column(0).to_pylist())
                yield from _rows(self.name, self.key, first, values)
            except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
                groups = f"row groups {unit.start} to {unit.stop - 1}"
                raise DataError(f"{self.path}: {groups} are damaged ({_one_line(error)}); get the file anew") from None


def _rows(name: str, key: str, first: int, values: Iterable[object]) -> Iterator[str]:
    """The texts in a column; `first` is how many rows stand before."""
    for number, text in enumerate(values, start=first + 1):
        if not isinstance(text, str):
            kind = "empty (null)" if text is None else f"a {type(text).__name__}"
            raise DataError(f"{name}: row {number}: {key} is {kind}, not a string; take such rows out first")
        if text.strip():
            yield text


# -- the Hugging Face Hub ----------------------------------------------------------------------------


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset as `datasets` keeps it on this machine; its units are ranges of rows."""

    name: str
    key: str
    split: str
    rows: int
    dataset: Any = field(repr=False)

    @property
    def kind(self) -> str:
        return f"dataset, {self.split}, {self.rows} rows, column {self.key}"

    def paths(self) -> tuple[Path, ...]:
        return tuple(Path(one["filename"]) for one in self.dataset.cache_files)

    def units(self, unit_bytes: int) -> list[Unit]:
        row_bytes = max(1, size_bytes(self) // self.rows)
        at_once = max(1, unit_bytes // row_bytes)
        bounds = [*range(0, self.rows, at_once), self.rows]
        return [Unit(a, b, (b - a) * row_bytes) for a, b in pairwise(bounds)]

    def documents(self, unit: Unit) -> Iterator[str]:
        starts = range(unit.start, unit.stop, _ROWS_AT_ONCE)
        values = (text for a in starts for text in self.dataset[a : min(a + _ROWS_AT_ONCE, unit.stop)][self.key])
        return _rows(self.name, self.key, unit.start, values)


def open_hub(name: str, key: str) -> HubDataset:
    """`hf:OWNER/NAME[:CONFIG[:SPLIT]]`; the split is `train` where none is given."""
    words = name.removeprefix(HUB).split(":", 2)
    if not words[0]:
        raise DataError(f"{name}: a dataset is given as {HUB}OWNER/NAME, {HUB}OWNER/NAME:CONFIG or ...:CONFIG:SPLIT")
    path, config, split = (*words, "", "")[:3]
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name}: datasets of the Hugging Face Hub need the package datasets: {_EXTRA}") from None
    try:
        dataset = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # of its own, of the network's packages, of the dataset's reader
        raise DataError(
            f"{name}: datasets cannot load it ({_one_line(error)}); check the name, configuration and split "
            f"({HUB}OWNER/NAME:CONFIG:SPLIT) and the network, or give files that are on this machine"
        ) from None
    if key not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise DataError(f"{name}: no column {key} (columns: {columns}); --key names the column of the text")
    if not len(dataset) or not dataset.cache_files:
        raise DataError(f"{name}: datasets gives no rows in files; choose another split")
    return HubDataset(name, key, split or "train", len(dataset), dataset.select_columns([key]))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
