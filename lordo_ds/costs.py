"""What a run costs each rank: bytes across replicas, state, flops; from plain values, without tensors or processes.

Tests compare these numbers with what was counted, status and the start-up table show some, and a run that has not been
started can be planned with them. s, l and r are those of `lordo_ds.core`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from lordo_ds.comm.ledger import data_parallel_bytes, gather_bytes, reduction_bytes
from lordo_ds.config import LordoConfig
from lordo_ds.core.codec import codec_of
from lordo_ds.core.fragments import Interval, MatrixShards
from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.core.outer import ITERATIONS
from lordo_ds.core.ownership import Segment, at_owners, numel_of, owned_segments
from lordo_ds.core.schedule import SyncPlan
from lordo_ds.core.state import BY_NAME, KEPT, MOMENTS, PLACED, WIRE_ERRORS, Axis, Kept

_FIELD_BYTES = 8  # of a number in a header, and of a recorded row's
_WIDTHS = {"bf16": 2, "fp32": 4}
_MOMENT_NAMES = frozenset(kept.name for kept in MOMENTS)


@dataclass(frozen=True)
class Links:
    """How many replicas there are, and how many ranks of one divide what crosses between them (at ZeRO 0 all).

    `replica` and `twin` are this rank's: with messages of its own length for every owner, they matter by some bytes.
    """

    replicas: int
    twins: int = 1
    replica: int = 0
    twin: int = 0

    def sum_bytes(self, numel: int, width: int) -> int:
        """Of a sum over replicas of `numel` elements of `width` bytes."""
        return reduction_bytes(-(-numel // self.twins) * width, self.replicas)

    def legs_bytes(self, messages: Sequence[int], first: bool = True) -> int:
        """Of telling every owner `messages[m]` bytes, and of its telling all as many: `lordo_ds.sync.two_legs`.

        Args:
            first: whether there is a first leg.
        """
        lengths = [self._part(length) for length in messages]
        others = [length for m, length in enumerate(lengths) if m != self.replica]
        return sum(others) * first + len(others) * lengths[self.replica]

    def broadcast_bytes(self, numel: int, width: int) -> int:
        """Of the replica that tells all others what it has."""
        return -(-numel // self.twins) * width * (self.replicas - 1)

    def _part(self, length: int) -> int:
        """Of a message, what this one of the twins sends."""
        share = -(-length // self.twins)
        return max(0, min(share, length - self.twin * share))

    def fields_bytes(self, fields: int) -> int:
        """Of telling the others that many numbers."""
        return gather_bytes(_FIELD_BYTES * fields, self.replicas)


@dataclass(frozen=True)
class Holding:
    """One parameter on one rank. `width` is that of an element as it is stepped, 8 bytes in fp64.

    `intervals` are the elements [start, stop) of it that every shard of the replica holds; `shard` is this rank, and
    `owned` says which of its elements the replica owns, counted from the first that it holds.
    """

    plan: ParameterPlan
    intervals: tuple[Interval, ...]
    shard: int = 0
    width: int = 4
    has_basis: bool = True
    owned: Interval = (0, 0)

    @property
    def numel(self) -> int:
        start, stop = self.intervals[self.shard]
        return stop - start

    @cached_property
    def shards(self) -> MatrixShards:
        """Of a projected parameter."""
        rows, columns = self.plan.shape
        return MatrixShards((rows, columns), self.plan.side == "rows", self.intervals)

    def length(self, axis: Axis) -> int:
        """How much of an axis of the state the rank keeps."""
        if axis == "e":
            return self.numel
        if axis == "o":
            return self.owned[1] - self.owned[0]
        if axis == "r":
            return self.plan.rank
        if axis == "l":
            first, last = self.shards.moment_columns(self.shard)
            return last - first
        first, last = self.shards.rows(self.shard)
        return last - first if self.shards.basis_on_rows else self.plan.basis_side * (last > first)

    def elements(self, kept: Kept) -> int:
        """Of one tensor of the state."""
        return prod(map(self.length, kept.axes if self.plan.low_rank or "o" in kept.axes else ("e",)))

    def bytes_of(self, config: LordoConfig, kept: Kept) -> int:
        """Of one tensor of the state: what is an average or a basis is as wide as the weight."""
        width = self.width
        if width < 8:
            if kept.name == "error":
                width = _WIDTHS[config.error_feedback or "fp32"]
            elif kept.name in PLACED:
                width = _WIDTHS[config.anchor.dtype] if kept.name == "anchor" else 4
        return self.elements(kept) * width


# -- state -------------------------------------------------------------------------------------------


def needs_anchor(config: LordoConfig, low_rank: bool, alone: bool) -> bool:
    """One replica with plain averaging needs the anchor only where the basis comes from D."""
    from_weights = low_rank and config.basis_source != "gradient"
    return not alone or not config.outer.is_plain_average or from_weights


def is_kept(config: LordoConfig, kept: Kept, low_rank: bool, replicas: int) -> bool:
    """Whether a run with these settings keeps it of a parameter that is projected, or is not."""
    if not (low_rank or kept.dense):
        return False
    wanted = {
        "row_mean_sq": config.qh_mode == "factored",
        "col_mean_sq": config.qh_mode == "factored",
        "error": bool(config.error_feedback),
        "anchor": needs_anchor(config, low_rank, alone=replicas == 1),
        "outer_momentum": not (config.outer.is_plain_average or at_owners(config, replicas)),
        "owner_momentum": not config.outer.is_plain_average and at_owners(config, replicas),
        **dict.fromkeys(WIRE_ERRORS, replicas > 1 and codec_of(config.pseudo_gradient_dtype).lossy),
    }
    return wanted.get(kept.name, True)


def kind_of_state(name: str, low_rank: bool) -> str:
    """What one tensor of the state is counted as: moments of parameters that are not projected are on their own."""
    return f"dense_{name}" if not low_rank and name in _MOMENT_NAMES else name


def state_bytes(config: LordoConfig, holdings: Iterable[Holding], replicas: int) -> dict[str, int]:
    """Bytes of optimizer state on a rank by kind; what has one value per element lies on the host of an accelerator."""
    kinds: Counter[str] = Counter()
    for holding in holdings:
        low_rank = holding.plan.low_rank
        for kept in KEPT:
            if is_kept(config, kept, low_rank, replicas):
                kinds[kind_of_state(kept.name, low_rank)] += holding.bytes_of(config, kept)
    return dict(kinds)


def border_copy_bytes(holdings: Iterable[Holding], factored: bool) -> int:
    """Bytes of moments of border rows that another shard keeps too, and owns."""
    total = 0
    for holding in holdings:
        if not holding.plan.low_rank or holding.shards.basis_on_rows:
            continue
        first, last = holding.shards.owned_rows(holding.shard)
        copies = sum(not first <= row < last for _, row in holding.shards.borders(holding.shard))
        total += copies * (2 * holding.plan.rank + factored) * holding.width
    return total


def adamw_bytes(holdings: Iterable[Holding]) -> int:
    """Bytes of AdamW's two moments for the same elements."""
    return 2 * sum(holding.numel * holding.width for holding in holdings)


# -- what crosses replicas ---------------------------------------------------------------------------


def sync_bytes(
    config: LordoConfig,
    plan: SyncPlan,
    buckets: Sequence[Sequence[Holding]],
    links: Links,
    header_fields: int,
    trailer_fields: int,
    row_numbers: int = 0,
) -> int:
    """Bytes that a rank sends across replicas in an ordinary sync (all replicas take part).

    Args:
        buckets: what is averaged in one message each; one dtype each.
        header_fields: of a replica, besides the step of each parameter.
        trailer_fields: of a replica.
        row_numbers: of recorded rows, each with one more number than the user gave it.
    """
    if links.replicas == 1:
        return 0
    parameters, codec = sum(map(len, buckets)), codec_of(config.pseudo_gradient_dtype)
    sent = links.fields_bytes(header_fields + parameters) + links.fields_bytes(trailer_fields)
    sent += links.sum_bytes(row_numbers, _FIELD_BYTES)
    owners = at_owners(config, links.replicas)
    gradients = plan.refresh_basis and config.basis_source == "gradient" and config.projection == "global"
    for bucket in buckets:
        width = bucket[0].width
        owned = ownership(bucket, links.replicas, owners, codec.block)
        if codec.lossy or owners:
            sent += links.legs_bytes([codec.message_bytes(numel_of(segments), width) for segments in owned])
        else:
            sent += links.sum_bytes(sum(one.numel for one in bucket), width)
        for beta in (0, 1):
            if plan.averages(beta) and owners:
                lengths = [width * _owned_moments(config, bucket, segments, beta) for segments in owned]
                sent += links.legs_bytes(lengths)
                if beta == 0 and plan.refresh_basis and not plan.averages(1):  # in the old basis, and in the new one
                    sent += links.legs_bytes(lengths, first=False)
            elif plan.averages(beta):
                sent += links.sum_bytes(_moment_elements(config, bucket, beta), width)
        if owners and plan.refresh_basis:
            sent += links.legs_bytes([width * _owned_bases(bucket, segments) for segments in owned], first=False)
        if gradients:
            sent += sum(links.sum_bytes(one.numel, width) for one in bucket if one.plan.low_rank and one.has_basis)
    return sent


def ownership(bucket: Sequence[Holding], replicas: int, work_at_owners: bool, block: int) -> list[list[Segment]]:
    """What every replica owns of a bucket's parameters on this shard; `block` elements have a common scale."""
    held = [[stop - start for start, stop in one.intervals] for one in bucket]
    whole = [one.plan.low_rank and work_at_owners for one in bucket]
    return owned_segments(held, whole, replicas, block, bucket[0].shard if bucket else 0)


def _owned_moments(config: LordoConfig, bucket: Sequence[Holding], segments: Sequence[Segment], beta: int) -> int:
    """Elements of the averaged moments of what a replica owns: all of a matrix's, of other parameters a segment."""
    total = 0
    for segment in segments:
        one = bucket[segment.item]
        for kept in MOMENTS if one.plan.low_rank or config.average_dense_moments else ():
            if kept.beta == beta and is_kept(config, kept, one.plan.low_rank, replicas=2):
                total += one.elements(kept) if one.plan.low_rank else segment.numel
    return total


def _owned_bases(bucket: Sequence[Holding], segments: Sequence[Segment]) -> int:
    """Elements that this shard keeps of the bases that a replica owns."""
    chosen = [bucket[segment.item] for segment in segments]
    return sum(one.elements(BY_NAME["basis"]) for one in chosen if one.plan.low_rank and one.has_basis)


def _moment_elements(config: LordoConfig, bucket: Iterable[Holding], beta: int) -> int:
    averaged = [one for one in bucket if one.plan.low_rank or config.average_dense_moments]
    return sum(
        one.elements(kept)
        for one in averaged
        for kept in MOMENTS
        if kept.beta == beta and is_kept(config, kept, one.plan.low_rank, replicas=2)
    )


def first_basis_bytes(config: LordoConfig, holdings: Sequence[Holding], links: Links, flags: int) -> int:
    """Bytes that a rank sends across replicas in a step that gives all of these matrices their first bases.

    Args:
        flags: numbers that a replica tells of itself, besides one for each matrix.
    """
    if config.projection == "local" or links.replicas == 1:
        return 0
    gradients = sum(links.sum_bytes(holding.numel, holding.width) for holding in holdings)
    sent = links.fields_bytes(flags + len(holdings)) + gradients
    if at_owners(config, links.replicas) and links.replica == 0:  # which computes them for all
        sent += sum(links.broadcast_bytes(one.elements(BY_NAME["basis"]), one.width) for one in holdings)
    return sent


def other_methods_bytes(
    config: LordoConfig, plans: Sequence[ParameterPlan], replicas: int, replica_size: int, width: int
) -> dict[str, float]:
    """Bytes across replicas per step, of a rank, of those that LoRDO is compared with.

    `low_rank_ddp` sends coordinates of projected gradients at every step, whole ones of the others, and its bases for
    nothing; `diloco` sends the weights once in a `sync_interval`.

    Args:
        plans: of the whole model, or of a rank's slices and stage.
        width: bytes of an element that is sent.
    """
    elements = sum(plan.numel for plan in plans)
    coordinates = sum(plan.rank * plan.other_side if plan.low_rank else plan.numel for plan in plans)
    adamw, low_rank = (data_parallel_bytes(width * numel, replicas, replica_size) for numel in (elements, coordinates))
    return {"adamw_ddp": adamw, "low_rank_ddp": low_rank, "diloco": adamw / config.sync_interval}


# -- work --------------------------------------------------------------------------------------------


def step_flops(config: LordoConfig, holdings: Iterable[Holding]) -> int:
    """More than AdamW's in a step: into the basis and out of it, and out once more for what error feedback keeps."""
    products = 3 if config.error_feedback else 2
    return sum(2 * products * one.numel * one.plan.rank for one in holdings if one.plan.low_rank)


def orthogonalization_flops(s: int, l: int, iterations: int = ITERATIONS) -> int:  # noqa: E741
    """Of the Newton-Schulz iterations of one matrix: its Gram matrix, that squared, and their product with it."""
    return iterations * (4 * s * s * l + 2 * s**3)


def sync_flops(config: LordoConfig, plans: Iterable[ParameterPlan]) -> int:
    """Of orthogonalizing all matrices in a sync; the shards of a replica divide it, by whole matrices."""
    if not config.outer.orthogonalize:
        return 0
    return sum(orthogonalization_flops(plan.basis_side, plan.other_side) for plan in plans if plan.low_rank)
