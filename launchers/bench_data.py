#!/usr/bin/env python
"""How fast `lordo data` is beside sentencepiece's own encoder on all cores, on generated text.

    python launchers/bench_data.py --megabytes 200 --folder /tmp/bench-data

One after the other in one run, as often as asked, on the same text and with the same tokenizer:

- sentencepiece: `encode(texts, num_threads=cores)` in one process, on documents that are in memory already; nothing is
  read or written, and the time begins when the model is loaded.
- lordo data: the whole command, from jsonl to checked token files, start of the interpreter included.

Seconds are those of the clock and, where others use the machine too, those of the processors in all processes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from lordo_ds.data.corpus import EmbeddedCorpus, FileCorpus
from lordo_ds.data.tokenizer import train_tokenizer

_BATCH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, required=True, help="for the text, which is kept, and what is made of it"
    )
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    text, model = chosen.folder / "text.jsonl", chosen.folder / "tokenizer.model"
    if not text.exists():
        write_text(text, chosen.megabytes * 1_000_000)
    if not model.exists():
        model.write_bytes(train_tokenizer(EmbeddedCorpus().documents(), chosen.vocab))
    cores = len(os.sched_getaffinity(0))
    print(f"{text.stat().st_size / 1e6:.1f} MB of jsonl, {chosen.vocab} pieces, {cores} cores", flush=True)
    wait_for_orphans()
    for _ in range(chosen.rounds):
        theirs, tokens, text_bytes = sentencepiece_alone(text, model, cores)
        print(f"sentencepiece  {theirs}  {text_bytes / theirs.clock_s / 1e6:5.2f} MB/s  {tokens:,} tokens", flush=True)
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            ours = lordo_data(text, model, Path(folder, "out"))
            made = json.loads(Path(folder, "out.manifest.json").read_text())
        assert made["tokens"] == tokens + made["documents"], "both must have made the same tokens"
        print(f"lordo data     {ours}  {text_bytes / ours.clock_s / 1e6:5.2f} MB/s", flush=True)
        by_clock, by_processor = ours.clock_s / theirs.clock_s, ours.processor_s / theirs.processor_s
        print(f"ratio          {by_clock:.2f} by the clock, {by_processor:.2f} by the processors", flush=True)


@dataclass(frozen=True)
class Spent:
    """Seconds of the clock, and of all processors in this process and those that it has waited for."""

    clock_s: float
    processor_s: float

    @classmethod
    def now(cls) -> Spent:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return cls(time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used))

    def since(self, before: Spent) -> Spent:
        return Spent(self.clock_s - before.clock_s, self.processor_s - before.processor_s)

    def __str__(self) -> str:
        return f"{self.clock_s:6.1f} s by the clock  {self.processor_s:6.1f} s of processors"


def wait_for_orphans() -> None:
    """Become the parent of processes whose own has ended, so that their seconds are counted (Linux)."""
    set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def write_text(path: Path, size: int) -> None:
    """Documents of 10 to 80 lines, drawn from those of the embedded corpus; the same on every call."""
    draw = random.Random(0)
    lines = [line for text in EmbeddedCorpus().documents() for line in text.splitlines()]
    with path.open("w") as stream:
        while stream.tell() < size:
            stream.write(json.dumps({"text": "\n".join(draw.choices(lines, k=draw.randint(10, 80)))}) + "\n")


def sentencepiece_alone(text: Path, model: Path, cores: int) -> tuple[Spent, int, int]:
    """What it took; tokens; bytes of text."""
    texts = list(FileCorpus((text,)).documents())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    began, tokens = Spent.now(), 0
    for first in range(0, len(texts), _BATCH):
        tokens += sum(map(len, processor.encode(texts[first : first + _BATCH], num_threads=cores)))
    return Spent.now().since(began), tokens, sum(len(one.encode()) for one in texts)


def lordo_data(text: Path, model: Path, out: Path) -> Spent:
    """What the whole command took."""
    command = [sys.executable, "-m", "lordo_ds.cli.main", "data", text, "--out", out, "--tokenizer", model]
    began = Spent.now()
    subprocess.run(command, check=True)
    with suppress(ChildProcessError):  # there are no more
        while True:
            os.wait()
    return Spent.now().since(began)


if __name__ == "__main__":
    main()
