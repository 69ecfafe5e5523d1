"""The command `lordo`: its subcommands, and errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lordo_ds.cli import ckpt, data
from lordo_ds.cli.printing import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="lordo", description="Tools for runs trained with LoRDO.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    ckpt.add_to(commands)
    data.add_to(commands)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split()).removeprefix("LoRDO: ")
        print(f"lordo: {printable(message)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
