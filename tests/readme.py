"""The commands in the README, so that tests can run them as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def commands(heading: str, program: str) -> list[list[str]]:
    """Arguments of every command of a program in the shell blocks below a heading, in order; comments are dropped."""
    text = README.read_text(encoding="utf-8")
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"README.md has no section {heading!r}"
    blocks = re.findall(r"^```bash\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    found = [one[1:] for one in words if one[:1] == [program]]
    assert found, f"README.md, {heading!r}: no command {program}"
    return found
