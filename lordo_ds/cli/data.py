"""`lordo data`: text to a tokenizer and the token files that Megatron and `pretrain_gpt.py` read; and their check."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lordo_ds.cli.printing import printable
from lordo_ds.errors import ConfigError
from lordo_ds.progress import Progress, in_bytes

_VERIFY = "verify"
_EPILOG = """\
A SOURCE is a text file (cut into documents at blank lines), a .jsonl file (one document per line), a .parquet file
(needs pyarrow), or a dataset of the Hugging Face Hub as hf:OWNER/NAME[:CONFIG[:SPLIT]] (needs the package datasets, and
the network). What was stopped goes on when the same command is given again, and gives the same bytes.

lordo data verify PREFIX compares the files with the checksums in PREFIX.manifest.json.
"""


def add_to(commands: Any) -> None:
    """Add `data` to the parser of `lordo`."""
    data = commands.add_parser(
        "data",
        help="text to token files",
        usage="lordo data SOURCE... --out PREFIX [--tokenizer MODEL | --train-tokenizer VOCAB]\n"
        "                  [--workers N] [--dedup] [--key NAME]\n"
        "       lordo data verify PREFIX",
        description="Write PREFIX.bin, .idx, .model and .manifest.json; pretrain_gpt.py takes --data PREFIX.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.add_argument("sources", nargs="+", metavar="SOURCE")
    data.add_argument("--out", type=Path, metavar="PREFIX", help="beginning of the names of the files to write")
    tokenizer = data.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", type=Path, metavar="MODEL", help="a sentencepiece model; default: train one")
    tokenizer.add_argument(
        "--train-tokenizer", type=int, metavar="VOCAB", help="train one of VOCAB pieces on the text; default: 4096"
    )
    data.add_argument("--workers", type=int, metavar="N", help="processes; default: as many as there are cores")
    data.add_argument("--dedup", action="store_true", help="leave out documents whose text an earlier one has")
    data.add_argument("--key", default="text", metavar="NAME", help="where records have the text; default: text")
    data.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> None:
    if find_spec("sentencepiece") is None:
        raise ConfigError("lordo data needs sentencepiece: pip install 'lordo_ds[data]'")
    verifies = chosen.sources[0] == _VERIFY and chosen.out is None
    if verifies and len(chosen.sources) != 2:
        raise ConfigError("lordo data verify takes one PREFIX")
    if not verifies and chosen.out is None:
        raise ConfigError("--out PREFIX is missing: the beginning of the names of the files to write")
    if chosen.workers is not None and chosen.workers < 1:
        raise ConfigError(f"--workers {chosen.workers}: must be at least 1")
    try:
        if verifies:
            _verify(Path(chosen.sources[1]))
        else:
            _make(chosen)
    except KeyboardInterrupt:
        print("lordo: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _verify(prefix: Path) -> None:
    from lordo_ds.data.manifest import read_manifest, verify

    total = sum(facts.bytes for facts in read_manifest(prefix).files.values())
    with Progress("verifying", total) as progress:
        manifest = verify(prefix, progress.add)
    print(
        f"{printable(str(prefix))}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{in_bytes(total)}: all checksums fit"
    )


def _make(chosen: argparse.Namespace) -> None:
    from lordo_ds.data.build import Settings, make
    from lordo_ds.data.prepared import DEFAULT_VOCAB
    from lordo_ds.data.sources import open_sources

    settings = Settings(
        tokenizer=chosen.tokenizer,
        vocab_size=DEFAULT_VOCAB if chosen.train_tokenizer is None else chosen.train_tokenizer,
        workers=chosen.workers or len(os.sched_getaffinity(0)),
        dedup=chosen.dedup,
    )
    make(
        open_sources(chosen.sources, chosen.key), chosen.out, settings, lambda line: print(printable(line), flush=True)
    )
