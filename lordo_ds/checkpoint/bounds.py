"""Counts in a header, held against what the files hold: nobody loops over, or makes room for, what a forger wrote."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lordo_ds.checkpoint.header import FragmentLayout, Header, Mesh, Untrained
from lordo_ds.errors import CheckpointError


def check_header(header: Header, where: str) -> None:
    """Refuse a header whose parameters do not lie within themselves, or on another mesh.

    Raises:
        CheckpointError: naming the parameter and what is wrong with it.
    """
    every: list[FragmentLayout | Untrained] = [*header.fragments, *header.engine.untrained]
    for one in every:
        wrong = _wrong_slices(one, header.mesh) or (_wrong_fragment(one) if isinstance(one, FragmentLayout) else "")
        if wrong:
            raise CheckpointError(f"LoRDO: {where}: {one.name[:80]!r} has {wrong}: it is damaged")


def _wrong_slices(one: FragmentLayout | Untrained, mesh: Mesh) -> str:
    dim = one.partition_dim
    if dim is not None and not 0 <= dim < len(one.shape):
        return f"partition_dim {dim} and {len(one.shape)} dimensions"
    if one.partitions not in (1, mesh.slices) or (one.partitions > 1 and dim is None):
        return f"{one.partitions} slices along dimension {dim}, saved by {mesh.slices} tensor-parallel ranks"
    if one.partition_stride > max(1, 0 if dim is None else one.shape[dim]):
        return f"{one.partition_stride} blocks in a dimension of {0 if dim is None else one.shape[dim]}"
    return ""


def _wrong_fragment(one: FragmentLayout) -> str:
    start, stop = one.interval
    if not start <= stop <= one.numel:
        return f"the elements {start} to {stop} of {one.numel}"
    if one.low_rank and (len(one.shape) != 2 or one.side not in ("rows", "columns")):
        return f"a basis on {one.side[:20]!r} of {len(one.shape)} dimensions"
    if one.low_rank and one.rank > max(one.whole_shape):
        return f"rank {one.rank} of a matrix {one.whole_shape}"
    return ""


def check_cover(layouts: Sequence[FragmentLayout], where: str) -> None:
    """Refuse shards that do not hold each element of their tensor slice once.

    Raises:
        CheckpointError: naming the parameter.
    """
    held = sum(stop - start for start, stop in (one.interval for one in layouts))
    if held != layouts[0].numel or any(one.shape != layouts[0].shape for one in layouts):
        raise CheckpointError(
            f"LoRDO: {where}: the shards hold {held} elements of {layouts[0].name[:80]!r}, which has "
            f"{layouts[0].numel}: it is damaged"
        )


def is_held(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie in its file, each in a place of its own: a stride of 0 makes many of one."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
