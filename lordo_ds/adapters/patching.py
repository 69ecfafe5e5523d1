"""Reversible patches on third-party classes, refused where the code is not the one they were written for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class PatchError(RuntimeError):
    """The third-party code is not the one that a patch was written against."""


class MethodPatch:
    """Replaces one method of a class; `remove` puts the original back.

    Args:
        owner: the class.
        name: the method.
        parameters: the names of its parameters, self included, in the version this was written against.
        make: original -> replacement.
        written_against: that version, for the error message.
    """

    def __init__(
        self, owner: type, name: str, parameters: tuple[str, ...], make: Callable[[Any], Any], written_against: str
    ) -> None:
        self.owner, self.name = owner, name
        self.original = getattr(owner, name)
        found = tuple(inspect.signature(self.original).parameters)
        if found[: len(parameters)] != parameters:
            raise PatchError(
                f"LoRDO: {owner.__name__}.{name} takes {found}, not {parameters} as in {written_against}: "
                f"install that version, or a newer lordo_ds"
            )
        self.replacement = make(self.original)
        setattr(owner, name, self.replacement)

    def remove(self) -> None:
        """Restore the original; refuses if somebody else patched the method after us."""
        if getattr(self.owner, self.name) is not self.replacement:
            raise PatchError(f"LoRDO: {self.owner.__name__}.{self.name} was patched again by somebody else; it stays")
        setattr(self.owner, self.name, self.original)
