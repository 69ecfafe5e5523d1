"""Which megatron-core this was written against, and the check that a patched function is still that one."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

OLDEST, NEWEST = (0, 16), (0, 19)
"""Minor versions, both included; 0.16 is the last for Python 3.11, 0.17 and later need 3.12."""


class MegatronMismatchError(RuntimeError):
    """The installed megatron-core is not one that a patch was written for."""


def megatron_version() -> tuple[int, int]:
    """Major and minor version of the installed megatron-core."""
    major, minor = importlib.import_module("megatron.core").__version__.split(".")[:2]
    return int(major), int(minor)


def require_supported_version() -> None:
    """Refuse a megatron-core outside `OLDEST`..`NEWEST`."""
    found = megatron_version()
    if not OLDEST <= found <= NEWEST:
        raise MegatronMismatchError(
            f"megatron-core {found[0]}.{found[1]} is not supported: install one from "
            f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        )


def require_parameters(owner: Any, name: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    """Return `owner.name`, having checked that its parameters have these names in this order.

    Raises:
        MegatronMismatchError: it is missing, or takes something else.
    """
    where = f"{owner.__name__}.{name}"
    function: Callable[..., Any] | None = getattr(owner, name, None)
    if function is None:
        raise MegatronMismatchError(f"{where} does not exist; the patch for it needs an update")
    found = tuple(inspect.signature(function).parameters)
    if found != parameters:
        raise MegatronMismatchError(
            f"{where} takes ({', '.join(found)}), but its patch was written for ({', '.join(parameters)})"
        )
    return function
