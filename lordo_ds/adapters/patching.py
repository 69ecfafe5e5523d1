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


def check_parameters(
    function: Any, name: str, parameters: tuple[str, ...], written_against: str, passes_on: bool = False
) -> None:
    """Refuse a function whose first parameters have other names.

    Args:
        passes_on: the replacement hands on whatever it is given; so somebody's wrapper that does the same, and shows no
            parameters, may stand between it and the original.
    """
    found = tuple(inspect.signature(function).parameters)
    if found[: len(parameters)] == parameters:
        return
    somebody = _somebodys_wrapper(function, written_against)
    if somebody is not None and passes_on:
        return
    if somebody is not None:
        raise PatchError(
            f"LoRDO: {name} was replaced in this process by {somebody}, which hides its parameters {parameters}: "
            "decorate that function with functools.wraps(the original)"
        )
    raise PatchError(
        f"LoRDO: {name} takes {found}, not {parameters} as in {written_against}: "
        f"install that version, or a newer lordo_ds"
    )


def _somebodys_wrapper(function: Any, written_against: str) -> str | None:
    """The name of a function that takes (*args, **kwargs) only and is not of the patched package itself; else None."""
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    module = getattr(function, "__module__", None) or "nowhere"
    if kinds != {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return None
    if written_against.lower().startswith(module.partition(".")[0]):
        return None
    return f"{module}.{getattr(function, '__qualname__', function)}"


def replace_method(
    instance: Any,
    name: str,
    parameters: tuple[str, ...],
    make: Callable[[Any], Any],
    written_against: str,
    passes_on: bool = False,
) -> None:
    """Replace a method of one instance only; `make` gets the bound original. `passes_on` as for `check_parameters`."""
    original = getattr(instance, name)
    check_parameters(original, f"{type(instance).__name__}.{name}", parameters, written_against, passes_on)
    setattr(instance, name, make(original))
