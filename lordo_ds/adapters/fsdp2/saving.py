"""The optimizer's state as torch.distributed.checkpoint takes it: what is sharded as DTensors, the header in a group.

What is saved says nothing of shards and tensor slices, which torch puts together and cuts anew: a state of the whole
parameter is a DTensor on the parameter's mesh, cut along the same side of it. What every shard keeps whole is a plain
tensor, and saved by one of them. Replicas differ between syncs: each saves, and loads, in a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from torch import Size, Tensor

from lordo_ds.adapters.fsdp2.layout import SHARD, TENSOR
from lordo_ds.checkpoint.header import FragmentLayout, Header, Mesh
from lordo_ds.core.local import is_distributed, local_part
from lordo_ds.core.state import BY_NAME, OWNED, Axis, Kept
from lordo_ds.errors import CheckpointError
from lordo_ds.replica.allocate import Held
from lordo_ds.replica.fragment import Fragment

# In the first parameter group, which torch's functions keep; they drop what else an optimizer's state holds.
_HEADER = "lordo"
_OF_ELEMENTS: tuple[tuple[Axis, ...], ...] = (("e",), ("o",))


def whole_header(header: Header) -> Header:
    """What is equal on all ranks of a replica: of whole parameters, without this rank's place."""
    return header.model_copy(
        update={
            "mesh": Mesh(replicas=header.mesh.replicas, replica=header.mesh.replica),
            "fragments": tuple(_whole(one) for one in header.fragments),
            "bytes_sent": {},
            "owned_over": (header.mesh.shards, header.mesh.slices),
        }
    )


def _whole(layout: FragmentLayout) -> FragmentLayout:
    shape = layout.whole_shape
    return FragmentLayout(
        name=layout.name,
        shape=shape,
        partition_dim=None,
        partitions=1,
        partition_stride=1,
        low_rank=layout.low_rank,
        side=layout.side,
        rank=layout.rank,
        interval=(0, prod(shape)),
        tensor=layout.tensor,
        offset=0,
    )


# -- saving ------------------------------------------------------------------------------------------


def pack(state_dict: dict[str, Any], held: Held, roles_of: Callable[[Tensor], list[str]]) -> dict[str, Any]:
    """The state as torch.distributed.checkpoint takes it. Nothing is communicated.

    DTensors share the memory of the optimizer's own tensors, so that a load writes there.

    Args:
        state_dict: as torch's `Optimizer.state_dict` makes it, with the header beside.
        roles_of: what each dimension of a parameter's mesh does.
    """
    first, *others = state_dict["param_groups"]
    packed = {index: dict(entries) for index, entries in state_dict["state"].items()}
    for index, (tensor, fragments) in enumerate(held.of_tensor.items()):  # in the order of the groups
        if is_distributed(tensor):
            for fragment in fragments:
                packed[index][fragment.plan.name] = _packed(fragment, tensor, roles_of(tensor))
    return {"state": packed, "param_groups": [{**first, _HEADER: state_dict[_HEADER]}, *others]}


def _packed(fragment: Fragment, parameter: Any, roles: Sequence[str]) -> dict[str, Any]:
    """The state of one parameter: what is cut as DTensors, the rest as it is, but for tensors without elements."""
    found: dict[str, Any] = {}
    for name, value in fragment.state.items():
        kept = BY_NAME.get(name)
        if kept is None:
            found[name] = value
        elif kept.axes in _OF_ELEMENTS or not fragment.plan.low_rank:
            part = _among_all(value, fragment) if name in OWNED else value
            part = part.view(local_part(parameter).shape)
            found[name] = _distributed(part, parameter, parameter.placements, parameter.shape)
        elif (axis := _cut_axis(kept, fragment)) is not None:
            found[name] = _oriented(kept, axis, value, fragment, parameter, roles)
        elif fragment.numel:
            found[name] = value  # whole on every shard that has elements
    return found


def _among_all(owned: Tensor, fragment: Fragment) -> Tensor:
    """What the replica keeps of the elements that it owns, and zeros for the others."""
    elements = owned.new_zeros(fragment.numel)
    elements[slice(*fragment.owned)] = owned
    return elements


def _cut_axis(kept: Kept, fragment: Fragment) -> Axis | None:
    """Which axis of a matrix's state the shards cut; None: none, as rows cut only the side without the basis."""
    if kept.dim("l") is not None:
        return "l"
    return "s" if fragment.plan.side == "rows" else None


def _oriented(
    kept: Kept, axis: Axis, value: Tensor, fragment: Fragment, parameter: Any, roles: Sequence[str]
) -> Tensor:
    """A tensor with axes of the oriented matrix: the shards cut `axis`; tensor slices cut l, and no other."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    plan, dim = fragment.plan, kept.dim(axis)
    assert dim is not None
    lengths: dict[Axis, int] = {"r": plan.rank, "s": plan.basis_side, "l": plan.whole_other_side}
    sliced = axis == "l" and plan.partitions > 1
    by_role = {
        # The slices come first, and the shards cut each of them.
        SHARD: _StridedShard(dim, split_factor=plan.partitions) if sliced and SHARD in roles else Shard(dim),
        TENSOR: Shard(dim) if sliced else Replicate(),
    }
    shape = Size(lengths[one] for one in kept.axes)
    return _distributed(value, parameter, [by_role[role] for role in roles], shape)


def _distributed(part: Tensor, parameter: Any, placements: Sequence[Any], shape: Size) -> Tensor:
    """A DTensor on the parameter's mesh whose part on this rank is this tensor, sharing its memory."""
    from torch.distributed.tensor import DTensor

    stride = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    mesh = parameter.device_mesh
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


# -- loading -----------------------------------------------------------------------------------------


def unpack(state_dict: Any) -> dict[str, Any]:
    """The inverse of `pack`: this rank's parts as plain tensors. Nothing is communicated.

    Args:
        state_dict: with parameters by number or, as torch's functions give it, by name.

    Raises:
        CheckpointError: it has no parameter groups, or states of others.
    """
    given = state_dict if isinstance(state_dict, Mapping) else {}
    groups, state = given.get("param_groups"), given.get("state")
    well_formed = isinstance(groups, list) and all(isinstance(one, Mapping) and "params" in one for one in groups)
    if not (groups and well_formed and isinstance(state, Mapping)):
        raise CheckpointError(
            "LoRDO: the saved state has no states, or no parameter groups: it is damaged, or was made with "
            "flatten_optimizer_state_dict, which leaves out its header"
        )
    numbers = {key: number for number, key in enumerate(key for group in groups for key in group["params"])}
    found: dict[int, Any] = {}
    for key, of_parameter in state.items():
        if key not in numbers or not isinstance(of_parameter, Mapping):
            raise CheckpointError(f"LoRDO: the saved state of {key!r} belongs to no parameter of its groups: damaged")
        found[numbers[key]] = {name: _unpacked(entries) for name, entries in of_parameter.items()}
    plain = [{key: value for key, value in group.items() if key != _HEADER} for group in groups]
    return {"state": found, "param_groups": plain, _HEADER: groups[0].get(_HEADER)}


def _unpacked(entries: Any) -> Any:
    """Of one parameter; a shard without elements has none of what is whole on the others."""
    if not isinstance(entries, Mapping):
        return entries
    low_rank = "has_basis" in entries
    found = {}
    for name, value in entries.items():
        if isinstance(value, Tensor):
            part = local_part(value)
            of_elements = not low_rank or (name in BY_NAME and BY_NAME[name].axes in _OF_ELEMENTS)
            found[name] = part.reshape(-1) if of_elements else part
        else:
            found[name] = value
    moments = found.get("exp_avg")
    if low_rank and "basis" not in found and isinstance(moments, Tensor) and not moments.numel():
        found["basis"] = moments.new_zeros(0, len(moments))
        if "col_mean_sq" in found:
            found["row_mean_sq"] = moments.new_zeros(0)
    return found
