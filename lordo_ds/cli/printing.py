"""What comes out of files, in a terminal: as text, whatever escape sequences somebody put into a name."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text in one line, with what is not printable as Python would write it."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)
