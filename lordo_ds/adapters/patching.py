"""Reversible patches on third-party code, refused where it is not the code they were written for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class PatchError(RuntimeError):
    """The third-party code is not the one that a patch was written against."""


class MethodPatch:
    """Replaces one function of a class or module; `remove` puts the original back.

    Args:
        owner: the class or module.
        name: the function.
        parameters: the names of its first parameters, self included, in the version this was written against.
        make: original -> replacement.
        written_against: that version, for the error message.
    """

    def __init__(
        self, owner: Any, name: str, parameters: tuple[str, ...], make: Callable[[Any], Any], written_against: str
    ) -> None:
        self.owner, self.name = owner, name
        self.original = getattr(owner, name)
        check_parameters(self.original, f"{owner.__name__}.{name}", parameters, written_against)
        self.replacement = make(self.original)
        setattr(owner, name, self.replacement)

    def remove(self) -> None:
        """Restore the original; refuses if somebody else patched the function after us."""
        if getattr(self.owner, self.name) is not self.replacement:
            raise PatchError(f"LoRDO: {self.owner.__name__}.{self.name} was patched again by somebody else; it stays")
        setattr(self.owner, self.name, self.original)


def check_parameters(function: Any, name: str, parameters: tuple[str, ...], written_against: str) -> None:
    """Refuse a function whose first parameters have other names."""
    found = tuple(inspect.signature(function).parameters)
    if found[: len(parameters)] != parameters:
        raise PatchError(
            f"LoRDO: {name} takes {found}, not {parameters} as in {written_against}: "
            f"install that version, or a newer lordo_ds"
        )


def replace_method(
    instance: Any, name: str, parameters: tuple[str, ...], make: Callable[[Any], Any], written_against: str
) -> None:
    """Replace a method of one instance only; `make` gets the bound original."""
    original = getattr(instance, name)
    check_parameters(original, f"{type(instance).__name__}.{name}", parameters, written_against)
    setattr(instance, name, make(original))
