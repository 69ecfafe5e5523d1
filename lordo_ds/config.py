"""The `optimizer.params` block of a DeepSpeed JSON as a frozen, validated `LordoConfig`.

Every rejected value is reported in one line that names the key, the value, the rule and the nearest
legal value.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lordo_ds.config_errors import one_line
from lordo_ds.errors import ConfigError

JSON_PATH = "optimizer.params."  # of our keys in a DeepSpeed configuration
LARGEST_BLOCK = 4096  # of a sparse wire format: a position takes 12 bits


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LowRankSelection(_Block):
    """Which parameters are projected, as regular expressions searched in parameter names.

    Without `include`, every 2-D weight that is no embedding, tied weight or output head; with it,
    exactly the 2-D weights that one of its expressions matches. `exclude` always wins.
    """

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    @field_validator("include", "exclude")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...] | None) -> tuple[str, ...] | None:
        import re

        for pattern in patterns or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"a list of regular expressions; {pattern!r}: {error} (nearest: {json.dumps([re.escape(pattern)])})"
                ) from None
        return patterns


class OuterOptimizer(_Block):
    """Outer optimizer on the pseudo-gradient; the default is plain averaging.

    `orthogonalize` and `residual_gain` concern projected matrices only. `compute` says where it and the refresh of the
    bases run: on every replica, or each matrix on one of them, its owner; "auto" asks `lordo_ds.costs`.
    """

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: StrictBool = True
    orthogonalize: StrictBool = False
    residual_gain: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    compute: Literal["auto", "owner", "everyone"] = "auto"

    @property
    def is_plain_average(self) -> bool:
        return self.lr == 1.0 and self.momentum == 0.0 and not self.orthogonalize and self.residual_gain == 1.0


class AnchorPlacement(_Block):
    """Where and how the parameters of the last sync are kept. `None`: pinned host memory for CUDA."""

    device: Literal["same", "cpu"] | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"


class TopK(_Block):
    """A sparse wire format: of each block of elements, the `top_k` largest travel."""

    top_k: StrictInt
    block: StrictInt = LARGEST_BLOCK

    @model_validator(mode="before")
    @classmethod
    def _at_most_a_block(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        top_k, block = given.get("top_k"), given.get("block", LARGEST_BLOCK)
        if not (type(top_k) is type(block) is int and 1 <= top_k <= block <= LARGEST_BLOCK):
            block = _nearest_count(block, LARGEST_BLOCK, otherwise=LARGEST_BLOCK)
            nearest = {"top_k": _nearest_count(top_k, block, otherwise=min(64, block)), "block": block}
            raise ValueError(
                f'{{"top_k": k, "block": b}} with whole numbers 1 <= k <= b <= {LARGEST_BLOCK} '
                f"(nearest: {json.dumps(nearest)})"
            )
        return given


WireFormat = Literal["fp32", "bf16", "int8", "int4"] | TopK


class Streaming(_Block):
    """The model syncs in `fragments`, one after the other; what a sync made is applied `delay_steps` later."""

    fragments: Annotated[StrictInt, Field(ge=1)] = 1
    delay_steps: Annotated[StrictInt, Field(ge=0)] = 0

    @property
    def is_on(self) -> bool:
        """Otherwise every sync is of everything, and done before training goes on."""
        return self.fragments > 1 or self.delay_steps > 0


class WireThrottle(_Block):
    """The rate and the latency of a slow link that the wire across replicas is made to imitate; 10^6 bits a Mbit."""

    mbit_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    latency_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


# What the project's own measurements support best (docs/results/claims.md).
_RECOMMENDED: dict[str, Any] = {
    "qh_mode": "factored",
    "omega": 0.9,
    "residual_weight": 0.25,
    "outer": {"lr": 1.0, "momentum": 0.7, "nesterov": True, "orthogonalize": True, "residual_gain": 2.0},
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},  # the published form of LoRDO (arXiv 2602.04396)
    "recommended": _RECOMMENDED,
    # With the fewest bytes that cost no loss in docs/results/wire.md.
    "slow_link": {**_RECOMMENDED, "pseudo_gradient_dtype": "int8"},
}


class LordoConfig(_Block):
    """All LoRDO settings; see the README for the meaning of each key.

    Build it with `LordoConfig.parse`, which applies the preset and words errors for users.
    """

    lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    rank: Annotated[StrictInt, Field(ge=1)] | str = 128
    sync_interval: Annotated[StrictInt, Field(ge=1)] = 32
    moment_sync_interval: StrictInt | tuple[StrictInt, StrictInt] | Literal["never"] | None = None
    replica_size: Annotated[StrictInt, Field(ge=1)] | Literal["node", "all"] = 1
    projection: Literal["global", "local"] = "global"
    preset: Literal["paper", "recommended", "slow_link"] = "paper"
    qh_mode: Literal["full_rank", "factored", "low_rank", "none"] = "full_rank"
    omega: Annotated[float, Field(ge=0, le=1)] = 0.5
    residual_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    error_feedback: Literal[False, "bf16", "fp32"] = False
    basis_source: Literal["pseudo_gradient", "complement", "gradient"] = "pseudo_gradient"
    basis_update: Literal["power", "eigh", "svd"] = "power"
    average_dense_moments: StrictBool = False
    low_rank: LowRankSelection = LowRankSelection()
    outer: OuterOptimizer = OuterOptimizer()
    pseudo_gradient_dtype: WireFormat = "fp32"
    anchor: AnchorPlacement = AnchorPlacement()
    streaming: Streaming = Streaming()
    sync_warmup_steps: Annotated[StrictInt, Field(ge=0)] = 0
    min_participants: Annotated[StrictInt, Field(ge=1)] | str = "1/2"
    max_nonfinite_syncs: Annotated[StrictInt, Field(ge=1)] = 3
    max_left_out_syncs: Annotated[StrictInt, Field(ge=1)] | Literal["never"] = 10
    max_outlier: Annotated[float, Field(gt=1, allow_inf_nan=False)] | Literal["never"] = 300.0
    sync_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    wire_throttle: WireThrottle | None = None
    _path: str = PrivateAttr(default=JSON_PATH)

    @classmethod
    def parse(cls, params: Any, path: str = JSON_PATH) -> LordoConfig:
        """Validate the keys of `optimizer.params`; keys given beside a preset, also inside `outer`, win over it.

        Args:
            path: what messages put before a key; "" where the user gave keyword arguments.

        Raises:
            ConfigError: one line naming the key, the value, the rule and the nearest legal value.
        """
        if not isinstance(params, Mapping):
            raise ConfigError(f"LoRDO: optimizer.params = {params!r:.80} must be an object of keys and values")
        try:
            config = cls.model_validate(_with_preset(params))
        except ValidationError as error:
            raise ConfigError(one_line(error, cls, path)) from None
        config._path = path
        return config

    def key(self, name: str) -> str:
        """A setting as its user wrote it."""
        return self._path + name

    @field_validator("error_feedback", mode="before")
    @classmethod
    def _no_integers(cls, value: Any) -> Any:
        if value is False or value in ("bf16", "fp32"):
            return value
        raise ValueError('false, "bf16" or "fp32"')

    @field_validator("rank", "min_participants")
    @classmethod
    def _count_or_fraction(cls, value: int | str, info: ValidationInfo) -> int | str:
        if isinstance(value, str) and not _is_fraction(value):
            whole, example = ("the smaller side", '"1/8"') if info.field_name == "rank" else ("the replicas", '"1/2"')
            raise ValueError(f"an int >= 1, or a fraction of {whole} such as {example} (nearest: {example})")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> LordoConfig:
        intervals = self.moment_sync_interval
        for interval in intervals if isinstance(intervals, tuple) else (intervals,):
            if isinstance(interval, int) and (interval < 1 or interval % self.sync_interval):
                nearest = max(1, round(interval / self.sync_interval)) * self.sync_interval
                raise ValueError(
                    f"moment_sync_interval = {interval} must be a multiple of sync_interval = "
                    f"{self.sync_interval} (nearest: {nearest})"
                )
        if self.basis_source == "complement" and self.qh_mode in ("none", "low_rank"):
            raise ValueError(
                f'basis_source = "complement" needs directions outside the basis, and with qh_mode = "{self.qh_mode}" '
                'the weights never leave it: use qh_mode "full_rank" or "factored" (nearest: "full_rank")'
            )
        if self.basis_source == "complement" and self.omega == 1.0:
            raise ValueError(
                'basis_source = "complement" needs directions outside the basis, and with omega = 1 the full-rank term '
                "has no weight: use omega < 1 (nearest: 0.99)"
            )
        if self.residual_weight is not None and self.qh_mode != "factored":
            raise ValueError(
                f'residual_weight = {self.residual_weight:g} is for qh_mode = "factored", and qh_mode = '
                f'"{self.qh_mode}": leave it out (nearest: null)'
            )
        if self.outer.residual_gain != 1.0 and self.projection == "local":
            raise ValueError(
                f"outer.residual_gain = {self.outer.residual_gain:g} needs one basis for all replicas, and with "
                'projection = "local" each has its own: use projection "global" or leave it out (nearest: 1.0)'
            )
        if self.outer.compute == "owner" and self.projection == "local":
            raise ValueError(
                'outer.compute = "owner" refreshes bases for all replicas, and with projection = "local" each has its '
                'own: use projection "global" or leave it out (nearest: "auto")'
            )
        if self.outer.compute == "owner" and self.basis_source == "gradient":
            raise ValueError(
                'outer.compute = "owner" refreshes bases from the pseudo-gradient, and with basis_source = "gradient" '
                'they come from elsewhere: use basis_source "pseudo_gradient" or leave it out (nearest: "auto")'
            )
        self._check_streaming()
        return self

    def _check_streaming(self) -> None:
        fragments, delay, interval = self.streaming.fragments, self.streaming.delay_steps, self.sync_interval
        if fragments > interval:
            raise ValueError(
                f"streaming.fragments = {fragments} must be at most sync_interval = {interval}: every fragment has a "
                f"step of its own (nearest: {interval})"
            )
        if delay * fragments >= interval:
            raise ValueError(
                f"streaming.delay_steps = {delay} must be less than sync_interval / fragments, {interval}/{fragments}: "
                f"a fragment is applied before the next one begins (nearest: {(interval - 1) // fragments})"
            )
        if self.streaming.is_on and self.basis_source == "gradient":
            raise ValueError(
                'basis_source = "gradient" needs the gradient of the step that syncs, which streaming does not keep: '
                'use basis_source "pseudo_gradient" or leave streaming out (nearest: "pseudo_gradient")'
            )

    def rank_for(self, smaller_side: int) -> int:
        """Subspace rank for a matrix whose smaller side is given: at least 1, at most that side."""
        if isinstance(self.rank, str):
            return max(1, min(smaller_side, math.floor(Fraction(self.rank) * smaller_side)))
        return min(self.rank, smaller_side)

    @property
    def weight_of_residual(self) -> float:
        """Of the gradient's part outside the basis, in `qh_mode` "factored"."""
        return 1.0 - self.omega if self.residual_weight is None else self.residual_weight

    def least_participants(self, replicas: int) -> int:
        """Finite replicas that a sync needs: at least 1, at most all."""
        if isinstance(self.min_participants, str):
            return max(1, math.ceil(Fraction(self.min_participants) * replicas))
        return min(self.min_participants, replicas)

    @property
    def moment_sync_intervals(self) -> tuple[int, int]:
        """(Ku, Kv): steps between averagings of exp_avg and exp_avg_sq; 0 means never."""
        if self.moment_sync_interval is None:
            return self.sync_interval, self.sync_interval
        if self.moment_sync_interval == "never":
            return 0, 0
        if isinstance(self.moment_sync_interval, int):
            return self.moment_sync_interval, self.moment_sync_interval
        return self.moment_sync_interval


def _with_preset(params: Mapping[str, Any]) -> dict[str, Any]:
    """The keys given, and those of their preset that they leave open and do not rule out."""
    preset = params.get("preset")
    merged = copy.deepcopy(PRESETS.get(preset, {})) if isinstance(preset, str) else {}
    if params.get("qh_mode", "factored") != "factored":  # both weigh the parts of the factored term
        merged.pop("omega", None)
        merged.pop("residual_weight", None)
    if params.get("projection") == "local" and "outer" in merged:
        del merged["outer"]["residual_gain"]
    for key, value in params.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _nearest_count(value: Any, most: int, otherwise: int) -> int:
    """The whole number from 1 to `most` that is nearest to a value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return otherwise
    return round(max(1, min(value, most)))


def _is_fraction(text: str) -> bool:
    try:
        return "/" in text and 0 < Fraction(text) <= 1
    except (ValueError, ZeroDivisionError):
        return False
