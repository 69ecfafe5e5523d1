"""The wording of what is wrong with a setting: the key, the value, the rule, the nearest legal value."""

from __future__ import annotations

import difflib
import json
import math
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

# Keys whose values have several legal forms: one rule for all of them, with a legal example.
_FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rank": ('must be a whole number >= 1 or a fraction of the smaller side such as "1/8"', ('"1/8"',)),
    "replica_size": ('must be a whole number >= 1, "node" or "all"', ('"node"', '"all"', "1")),
    "min_participants": ('must be a whole number >= 1 or a fraction of the replicas such as "1/2"', ('"1/2"',)),
    "max_left_out_syncs": ('must be a whole number >= 1 or "never"', ('"never"', "10")),
    "max_outlier": ('must be a number > 1 or "never"', ('"never"', "300.0")),
    "moment_sync_interval": ('must be a multiple of sync_interval, a pair of them, or "never"', ('"never"',)),
    "betas": ("must be two numbers, each >= 0 and < 1", ("[0.9, 0.999]",)),
    "error_feedback": ('must be false, "bf16" or "fp32"', ('"bf16"', '"fp32"', "false")),
    "pseudo_gradient_dtype": (
        'must be "fp32", "bf16", "int8", "int4" or {"top_k": k, "block": b}',
        ('"bf16"', '"int8"', '"int4"', '"fp32"'),
    ),
    "low_rank.include": ("must be a list of regular expressions", ('[".*"]',)),
    "low_rank.exclude": ("must be a list of regular expressions", ('[".*"]',)),
    "wire_throttle": ('must be null or such as {"mbit_per_s": 100, "latency_ms": 10}', ('{"mbit_per_s": 100}', "null")),
    "wire_throttle.mbit_per_s": ("must be a number > 0", ("100",)),
    "wire_throttle.latency_ms": ("must be a number >= 0", ("0",)),
}
# Names that other optimizers and papers use for ours.
_ALIASES = {
    "learning_rate": "lr",
    "r": "rank",
    "k": "sync_interval",
    "K": "sync_interval",
    "sync_every": "sync_interval",
}
_BRANCHES = {"int", "str", "float", "constrained-int", "constrained-float", "constrained-str", "tuple", "TopK"}


def one_line(error: ValidationError, config: type[BaseModel], prefix: str) -> str:
    """The first complaint as one line: key, value, rule, nearest legal value.

    Args:
        config: the model that refused.
        prefix: what to put before a key.
    """
    complaint = _most_telling(error.errors(include_url=False))
    kind, context, value = complaint["type"], complaint.get("ctx", {}), complaint["input"]
    loc = complaint["loc"]
    keys = {0, len(loc) - 1 if kind == "extra_forbidden" else 0}  # the user's, however they are called
    path = [part for at, part in enumerate(loc) if at in keys or not _is_branch(part)]
    key = ".".join(str(part).encode("unicode_escape").decode() for part in path)
    where = f"LoRDO: {prefix}{key}"
    if kind == "extra_forbidden":
        block = config
        for part in path[:-1]:
            block = _block(config.model_fields[str(part)].annotation)
        nearest = _ALIASES.get(str(path[-1])) or _nearest_name(str(path[-1]), list(block.model_fields))
        return f'{where} = {value!r} is not a known key: did you mean "{nearest}"?'
    if kind == "missing" and isinstance(path[-1], str):  # a key of a block; a list that is too short has a form
        rule, legal = _FORMS.get(".".join(map(str, path)), ("must be given", ("null",)))
        return f"{where} is missing in {value!r}: it {rule} (nearest: {legal[-1]})"
    if kind == "value_error" and key != "error_feedback":
        message = str(context["error"])
        if not key:
            return f"LoRDO: {prefix.removesuffix('.')}: {message}" if prefix else f"LoRDO: {message}"
        return f"{where} = {value!r} must be {message}"
    form = _FORMS.get(".".join(str(part) for part in path if isinstance(part, str)))
    if form and kind not in ("greater_than_equal", "less_than_equal"):
        rule, legal = form
        nearest = _alike(value, legal) or ('"fp32"' if value is True and key == "error_feedback" else legal[-1])
    else:
        rule, nearest = _rule(kind, context, value, complaint["msg"])
        nearest = nearest or _default(config, path)
    return f"{where} = {value!r} {rule} (nearest: {nearest})"


def _most_telling(complaints: list[Any]) -> Any:
    """The first complaint; where it says that an object is no name, what the block that it may be says of it."""
    first = complaints[0]
    if first["type"] != "literal_error" or not isinstance(first["input"], dict):
        return first
    return next((other for other in complaints[1:] if other["loc"][0] == first["loc"][0]), first)


def _block(annotation: Any) -> type[BaseModel]:
    """The block that a key holds, or may hold beside plain values."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next(kind for kind in kinds if issubclass(kind, BaseModel))


def _nearest_name(name: str, legal: list[str]) -> str:
    """The legal name most like the given one."""
    return (difflib.get_close_matches(name, legal, n=1, cutoff=0.0) or legal[:1])[0]


def _alike(value: Any, legal: tuple[str, ...]) -> str:
    """The legal spelling that a misspelt string was probably meant to be."""
    names = [choice.strip('"') for choice in legal if choice.startswith('"')]
    close = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f'"{close[0]}"' if close else ""


def _default(config: type[BaseModel], path: list[Any]) -> str:
    """The default of a key, as JSON: the nearest legal value of one that is of another kind altogether."""
    block: Any = config()
    for part in path:
        if isinstance(part, str):
            block = getattr(block, part)
    return json.dumps(block.model_dump(mode="json") if isinstance(block, BaseModel) else block)


def _is_branch(part: Any) -> bool:
    return isinstance(part, str) and (part in _BRANCHES or "[" in part)


def _rule(kind: str, context: dict[str, Any], value: Any, message: str) -> tuple[str, str]:
    if kind == "greater_than_equal":
        return f"must be >= {context['ge']}", str(context["ge"])
    if kind == "less_than_equal":
        return f"must be <= {context['le']}", str(context["le"])
    if kind == "greater_than":
        return f"must be > {context['gt']}", str(context["gt"] + 1e-3)
    if kind == "less_than":
        return f"must be < {context['lt']}", str(context["lt"] - 1e-3)
    if kind == "literal_error":
        legal = str(context["expected"])
        choices = [choice.strip("' ") for choice in legal.replace(" or ", ",").split(",")]
        return f"must be one of {legal}", f'"{_nearest_name(str(value), choices)}"'
    if kind in ("int_type", "int_parsing", "int_from_float"):
        nearest = str(max(1, round(value))) if isinstance(value, float) and math.isfinite(value) else ""
        return "must be a whole number", nearest
    if kind == "finite_number":
        return "must be a finite number", ""
    return f"is not legal: {message[0].lower()}{message[1:]}", ""
