"""Any amount of text to a tokenizer and Megatron's token files, on all cores, and on from where it was stopped.

The sources are divided into units, by their content alone. Processes tokenize unit after unit into part files beside
the result; then all parts, in the order of the units, are shuffled into one pair of files. So neither the number of
processes nor how often the work was stopped changes a byte. The manifest is written last, and says that all is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt
import sentencepiece

from lordo_ds.data.corpus import DataError
from lordo_ds.data.encode import EncodeTask, TrainTask, encode_unit, train_model, write_whole
from lordo_ds.data.indexed import Lengths, Tokens, token_dtype, write_indexed
from lordo_ds.data.manifest import (
    SUFFIXES,
    Manifest,
    SourceFacts,
    data_path,
    file_facts,
    manifest_path,
    read_manifest,
    write_manifest,
)
from lordo_ds.data.parts import PartFacts, first_of_each, part_path, read_part
from lordo_ds.data.parts_folder import folder_of_parts
from lordo_ds.data.tokenizer import Tokenizer, check_vocab_size
from lordo_ds.data.units import UNIT_BYTES, Source, digest, size_bytes, state
from lordo_ds.data.workers import results_of
from lordo_ds.disk import flush_file, flush_folder, make_folder
from lordo_ds.progress import Progress, in_bytes, in_time

_FORMAT = 1
"""Raise it when the same text and settings would give other files."""
_SHUFFLE_SEED = 0
_TRAINING_UNITS = 64
"""A tokenizer is trained on so many units at most, evenly spread; of their lines it takes a sample."""


@dataclass(frozen=True)
class Settings:
    """How token files are made; `workers` and nothing else leaves the bytes as they are.

    Attributes:
        tokenizer: a sentencepiece model; None: one is trained.
        vocab_size: of the one that is trained.
        dedup: leave out documents whose text an earlier one has.
    """

    tokenizer: Path | None = None
    vocab_size: int = 4096
    workers: int = 1
    dedup: bool = False
    unit_bytes: int = UNIT_BYTES


def make(
    sources: Sequence[Source],
    prefix: Path,
    settings: Settings,
    say: Callable[[str], None] = print,
    stream: TextIO | None = None,
) -> Manifest:
    """Make `PREFIX.bin`, `.idx`, `.model` and `.manifest.json`, or find them there.

    Stopped at any time, it goes on when it is called again with the same arguments. `say` gets lines about what was
    done, `stream` (standard error, by default) the progress.

    Raises:
        DataError: text or settings that cannot be used, or files in the way.
    """
    if not prefix.name or prefix.is_dir():
        raise DataError(f"--out {prefix}: a folder; give the beginning of file names, as in {prefix / 'tokens'}")
    if settings.tokenizer is None:
        check_vocab_size(settings.vocab_size)
    make_folder(prefix.parent.absolute())
    with folder_of_parts(prefix) as folder:
        work = _Work(sources, prefix, folder, settings, say, stream)
        if manifest_path(prefix).exists():
            manifest = read_manifest(prefix)
            if manifest.made_of != work.made_of:
                raise DataError(
                    f"{manifest_path(prefix)}: made of other text or with other settings; give another --out, or "
                    f"delete it and the files beside it ({', '.join(SUFFIXES)}) first"
                )
            say(f"{prefix} is complete: nothing to do (lordo data verify {prefix} reads it all)")
        else:
            manifest = work.run()
            say(
                f"{prefix}: {manifest.documents:,} documents"
                + (f" ({manifest.duplicates:,} duplicates left out)" if settings.dedup else "")
                + f", {manifest.tokens:,} tokens of {manifest.vocab_size} pieces"
            )
        return manifest


class _Work:
    """One call of `make`, in the order of its methods."""

    def __init__(
        self,
        sources: Sequence[Source],
        prefix: Path,
        folder: Path,
        settings: Settings,
        say: Callable[[str], None],
        stream: TextIO | None,
    ) -> None:
        self.sources, self.prefix, self.folder, self.settings = sources, prefix, folder, settings
        self.say, self.stream = say, stream
        self.given_model = None if settings.tokenizer is None else _checked_model(settings.tokenizer)
        self.states = [state(source) for source in sources]
        self.digests = self._read_sources()
        self.units = [(number, unit) for number, one in enumerate(sources) for unit in one.units(settings.unit_bytes)]
        self.unit_keys = [
            [self.digests[number], sources[number].kind, unit.start, unit.stop] for number, unit in self.units
        ]
        if self.given_model is None:
            self.model_key = ["trained", settings.vocab_size]
        else:
            self.model_key = ["given", hashlib.sha256(self.given_model).hexdigest()]
        self.made_of = _key(self.model_key, settings.dedup, _SHUFFLE_SEED, self.unit_keys).hex()

    def _read_sources(self) -> list[str]:
        """Their digests. Threads serve: Python's lock is free while a block is hashed."""
        stopped = threading.Event()
        total = sum(map(size_bytes, self.sources))
        with (
            Progress("reading", total, stream=self.stream) as progress,
            ThreadPoolExecutor(self.settings.workers) as threads,
        ):

            def read(amount: int) -> None:
                if stopped.is_set():
                    raise InterruptedError("another file could not be read")
                progress.add(amount)

            try:
                return list(threads.map(lambda source: digest(source, read), self.sources))
            except BaseException:
                stopped.set()  # or the user's Ctrl-C would wait for the end of a large file
                raise

    def run(self) -> Manifest:
        model_path = self._model()
        tasks = [
            EncodeTask(self.sources[number], unit, model_path, part_path(self.folder, key), key, self.settings.dedup)
            for (number, unit), key in zip(self.units, self._part_keys(model_path), strict=True)
        ]
        facts = self._encode(tasks, token_dtype(Tokenizer(model_path).vocab_size))
        of_sources = self._facts_of_sources(facts)
        return self._join(tasks, facts, of_sources, model_path)

    # -- tokenizer -----------------------------------------------------------------------------------

    def _model(self) -> Path:
        """Where the model lies, in the folder of parts."""
        if self.given_model is not None:
            path = self.folder / f"given-{_key(self.model_key).hex()[:32]}.model"
            write_whole(path, self.given_model)
            return path
        chosen = np.unique(np.linspace(0, len(self.units) - 1, min(len(self.units), _TRAINING_UNITS)).astype(int))
        sampled = [self.unit_keys[i] for i in chosen]
        path = self.folder / f"trained-{_key(self.model_key, sampled).hex()[:32]}.model"
        if not path.exists():
            self.say(f"training a tokenizer of {self.settings.vocab_size} pieces")
            text = [(self.sources[number], unit) for number, unit in (self.units[i] for i in chosen)]
            with closing(results_of(train_model, [TrainTask(text, self.settings.vocab_size, path)], 1)) as results:
                list(results)
        return path

    def _part_keys(self, model_path: Path) -> list[bytes]:
        model = hashlib.sha256(model_path.read_bytes()).hexdigest()
        return [_key(model, self.settings.dedup, unit) for unit in self.unit_keys]

    # -- tokens --------------------------------------------------------------------------------------

    def _encode(self, tasks: Sequence[EncodeTask], dtype: np.dtype) -> list[PartFacts]:
        """Facts of every part, having made those that are not there."""

        def facts_of(task: EncodeTask) -> PartFacts | None:
            part = read_part(task.part_path, task.part_key, dtype, task.with_digests)
            return None if part is None else part.facts

        with ThreadPoolExecutor(self.settings.workers) as threads:
            facts = list(threads.map(facts_of, tasks))
        missing = [number for number, found in enumerate(facts) if found is None]
        if len(missing) < len(tasks):
            self.say(f"going on: {len(tasks) - len(missing)} of {len(tasks)} parts are there")
        began, text_bytes, tokens = time.monotonic(), 0, 0
        total = sum(tasks[number].unit.size_bytes for number in missing)
        todo = [tasks[number] for number in missing]
        with (
            Progress("tokenizing", total, stream=self.stream) as progress,
            closing(results_of(encode_unit, todo, self.settings.workers)) as results,
        ):
            for at, found in results:
                facts[missing[at]] = found
                text_bytes, tokens = text_bytes + found.text_bytes, tokens + found.tokens
                progress.add(todo[at].unit.size_bytes)
        seconds = time.monotonic() - began
        if todo:
            self.say(
                f"tokenized {in_bytes(text_bytes)} in {in_time(seconds)}: {in_bytes(text_bytes / seconds)}/s, "
                f"{tokens / seconds:,.0f} tokens/s (--workers {self.settings.workers})"
            )
        return [found for found in facts if found is not None]

    def _facts_of_sources(self, facts: Sequence[PartFacts]) -> list[SourceFacts]:
        found = []
        for number, source in enumerate(self.sources):
            if state(source) != self.states[number]:
                raise DataError(f"{source.name}: has changed while it was read; start again when it is complete")
            own = [one for (of, _), one in zip(self.units, facts, strict=True) if of == number]
            documents = sum(one.documents for one in own)
            if not documents:
                raise DataError(f"{source.name}: holds only white space; leave it out or fill it")
            found.append(
                SourceFacts(
                    name=source.name,
                    kind=source.kind,
                    bytes=size_bytes(source),
                    sha256=self.digests[number],
                    documents=documents,
                    text_bytes=sum(one.text_bytes for one in own),
                )
            )
        return found

    # -- the result ----------------------------------------------------------------------------------

    def _join(
        self,
        tasks: Sequence[EncodeTask],
        facts: Sequence[PartFacts],
        of_sources: list[SourceFacts],
        model_path: Path,
    ) -> Manifest:
        vocab_size = Tokenizer(model_path).vocab_size
        dtype = token_dtype(vocab_size)
        digests: list[npt.NDArray[np.uint8]] = []

        def batches() -> Iterator[tuple[Lengths, Tokens]]:
            for task in tasks:
                part = read_part(task.part_path, task.part_key, dtype, task.with_digests)
                if part is None:
                    raise DataError(f"{task.part_path}: was changed or taken away; start the same command again")
                digests.append(part.digests)
                yield part.lengths, part.tokens

        def chosen() -> npt.NDArray[np.bool_]:
            return first_of_each(np.concatenate(digests))

        joined = self.folder / "joined"
        arrived = sum(one.tokens for one in facts) * dtype.itemsize
        with Progress("joining", 3 * arrived, stream=self.stream) as progress:
            documents, tokens = write_indexed(
                joined, batches(), dtype, _SHUFFLE_SEED, chosen if self.settings.dedup else None, progress.add
            )
            shutil.copyfile(model_path, data_path(joined, ".model"))
            files = {one: file_facts(data_path(joined, one), progress.add) for one in SUFFIXES}
        for suffix in SUFFIXES:
            flush_file(data_path(joined, suffix))
            os.replace(data_path(joined, suffix), data_path(self.prefix, suffix))
        flush_folder(self.prefix.parent)
        manifest = Manifest(
            made_of=self.made_of,
            documents=documents,
            tokens=tokens,
            text_bytes=sum(one.text_bytes for one in facts),
            vocab_size=vocab_size,
            duplicates=sum(one.documents for one in facts) - documents,
            versions={"sentencepiece": sentencepiece.__version__},
            sources=of_sources,
            files=files,
        )
        write_manifest(self.prefix, manifest)
        return manifest


def _key(*values: object) -> bytes:
    """SHA-256 of plain values, and of what else decides the bytes everywhere."""
    return hashlib.sha256(json.dumps([_FORMAT, sentencepiece.__version__, *values]).encode()).digest()


def _checked_model(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(f"--tokenizer {path}: no such file; give a sentencepiece model, or --train-tokenizer VOCAB")
    Tokenizer(path)
    return path.read_bytes()
