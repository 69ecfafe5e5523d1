"""Where the parameters lie in the tensors that DeepSpeed's optimizer wrappers step.

Read off the internals of DeepSpeed 0.19.8, one function per wrapper, and checked against the weights themselves:

    the optimizer itself           fp32, stage 0           the parameters
    FP16_UnfusedOptimizer          bf16 and fp16, stage 0  one fp32 master per parameter
    DeepSpeedZeroOptimizer         stages 1 and 2          per group, an equal part of all parameters laid end to end
    BF16_Optimizer                 bf16, stage 1           the same, where gradients accumulate in fp32,
                                   bf16, pipelines         and at stage 0: it shards there too
    DeepSpeedZeroOptimizer_Stage3  stage 3                 per sub-group, an equal part of each parameter
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import is_optimized_parameter
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from lordo_ds.core.fragments import FlatTensor, Interval, Piece, whole
from lordo_ds.core.grouping import ParameterFacts
from lordo_ds.errors import ConfigError
from lordo_ds.optimizer import LoRDO


@dataclass(frozen=True)
class _Place:
    """One parameter in a stepped tensor: the elements each shard holds, and where this rank's start in it."""

    parameter: nn.Parameter
    intervals: tuple[Interval, ...]
    offset: int
    held: Interval


@dataclass(frozen=True)
class _Stepped:
    """One tensor that the base optimizer steps; `group` is the process group it is a shard of, None for a whole."""

    tensor: Tensor
    places: list[_Place]
    group: dist.ProcessGroup | None = None


def flat_tensors(engine: Any, facts: Mapping[nn.Parameter, ParameterFacts]) -> list[FlatTensor]:
    """Every tensor that the engine's base optimizer steps, with the parameters in it.

    Frozen parameters and those without elements are in none of them. Nothing is communicated.

    Args:
        facts: of every parameter of the model, with its full shape.

    Raises:
        ConfigError: the wrapper is not supported, or holds a parameter that is not part of the model.
        RuntimeError: the layout is not the one this was written for.
    """
    stepped = _stepped_tensors(engine)
    for one in stepped:
        for place in one.places:
            if place.parameter not in facts:
                shape = tuple(_full_shape(place.parameter))
                raise ConfigError(
                    f"LoRDO: the optimizer was given a parameter {shape} that is not part of the model: "
                    "make it one, or leave it out"
                )
    _check_coverage(stepped, facts)
    for one in stepped:
        _check_content(one, facts)
    return [
        FlatTensor(one.tensor, tuple(Piece(facts[p.parameter], p.intervals, p.offset) for p in one.places))
        for one in stepped
    ]


def _stepped_tensors(engine: Any) -> list[_Stepped]:
    layout = _LAYOUTS.get(type(engine.optimizer))
    if layout is None:
        raise ConfigError(
            f"LoRDO: DeepSpeed wraps the optimizer in {type(engine.optimizer).__name__}, which is not supported in "
            "this version: use stage 0, 1, 2 or 3 in fp32, bf16 or fp16 without MoE, ZenFlow, SuperOffload or NVMe"
        )
    found: list[_Stepped] = layout(engine.optimizer)
    return found


# -- the layouts -------------------------------------------------------------------------------------


def _whole_parameters(optimizer: LoRDO) -> list[_Stepped]:
    parameters = [p for group in optimizer.param_groups for p in group["params"] if is_optimized_parameter(p)]
    return [_Stepped(parameter, [_whole_place(parameter)]) for parameter in parameters]


def _whole_masters(wrapper: FP16_UnfusedOptimizer) -> list[_Stepped]:
    return [
        _Stepped(master, [_whole_place(parameter)])
        for masters, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
        for master, parameter in zip(masters, parameters, strict=True)
    ]


def _whole_place(parameter: nn.Parameter) -> _Place:
    (interval,) = whole(tuple(parameter.shape))
    return _Place(parameter, (interval,), 0, interval)


def _zero_1_and_2(wrapper: DeepSpeedZeroOptimizer) -> list[_Stepped]:
    found = []
    # `_hp_mapping` would be wrong with round_robin_gradients; these lists are in the order of the flat buffer.
    for i, tensor in enumerate(wrapper.single_partition_of_fp32_groups):
        parameters, starts = wrapper.round_robin_bit16_groups[i], wrapper.round_robin_bit16_offsets[i]
        found.append(_end_to_end(tensor, parameters, starts, wrapper.real_dp_process_group[i]))
    return found


def _bf16_optimizer(wrapper: BF16_Optimizer) -> list[_Stepped]:
    found = []
    for i, tensor in enumerate(wrapper.fp32_groups_flat_partition):
        parameters = wrapper.bf16_groups[i]
        starts = [sum(p.numel() for p in parameters[:n]) for n in range(len(parameters))]
        found.append(_end_to_end(tensor, parameters, starts, wrapper.real_dp_process_group[i]))
    return found


def _end_to_end(
    tensor: Tensor, parameters: Sequence[nn.Parameter], starts: Sequence[int], group: dist.ProcessGroup
) -> _Stepped:
    """Parameters from `starts` on in one flat buffer that is cut into equal parts; `tensor` is this rank's."""
    me, shards, size = dist.get_rank(group), dist.get_world_size(group), tensor.numel()
    places = []
    for parameter, start in zip(parameters, starts, strict=True):
        stop = start + parameter.numel()
        cuts = [(max(start, r * size), min(stop, (r + 1) * size)) for r in range(shards)]
        intervals = tuple((a - start, b - start) if a < b else (0, 0) for a, b in cuts)
        offset = cuts[me][0] - me * size if cuts[me][0] < cuts[me][1] else 0
        places.append(_Place(parameter, intervals, offset, intervals[me]))
    return _Stepped(tensor, places, group)


def _zero_3(wrapper: DeepSpeedZeroOptimizer_Stage3) -> list[_Stepped]:
    found = []
    for i, tensor in enumerate(wrapper.fp32_partitioned_groups_flat):
        group = wrapper._get_sub_group_process_group(i)
        me, shards = dist.get_rank(group), dist.get_world_size(group)
        places, offset = [], 0
        for parameter in wrapper.fp16_groups[i]:
            size, numel = parameter.partition_numel(), parameter.ds_numel
            cuts = [(r * size, min(numel, (r + 1) * size)) for r in range(shards)]
            intervals = tuple((a, b) if a < b else (0, 0) for a, b in cuts)
            held = intervals[me]
            places.append(_Place(parameter, intervals, offset if held[1] > held[0] else 0, held))
            offset += size
        found.append(_Stepped(tensor, places, group))
    return found


# Exact types: a subclass may keep its tensors elsewhere.
_LAYOUTS: dict[type, Callable[[Any], list[_Stepped]]] = {
    LoRDO: _whole_parameters,
    FP16_UnfusedOptimizer: _whole_masters,
    DeepSpeedZeroOptimizer: _zero_1_and_2,
    BF16_Optimizer: _bf16_optimizer,
    DeepSpeedZeroOptimizer_Stage3: _zero_3,
}


# -- checks ------------------------------------------------------------------------------------------


def _check_coverage(stepped: list[_Stepped], facts: Mapping[nn.Parameter, ParameterFacts]) -> None:
    """Every element of every parameter is held by exactly one shard, once."""
    seen: set[nn.Parameter] = set()
    for one in stepped:
        for place in one.places:
            held = sorted(interval for interval in place.intervals if interval[1] > interval[0])
            numel = int(torch.Size(_full_shape(place.parameter)).numel())
            edges = [0, *(edge for interval in held for edge in interval), numel]
            once = all(a == b for a, b in zip(edges[::2], edges[1::2], strict=True))
            fits = place.offset + place.held[1] - place.held[0] <= one.tensor.numel()
            if place.parameter in seen or not once or not fits:
                raise RuntimeError(f"LoRDO: {facts[place.parameter].name}: {_LAYOUT_CHANGED}")
            seen.add(place.parameter)


def _check_content(one: _Stepped, facts: Mapping[nn.Parameter, ParameterFacts]) -> None:
    """What the stepped tensor holds at each place is what the parameter holds, in the parameter's precision."""
    flat = one.tensor.detach().view(-1)
    for place in one.places:
        start, stop = place.held
        model = _held_elements(place.parameter, place.held)
        ours = flat[place.offset : place.offset + stop - start].to(model.device, model.dtype)
        if not torch.allclose(ours, model, rtol=0.0, atol=0.0, equal_nan=True):
            raise RuntimeError(f"LoRDO: {facts[place.parameter].name}, elements {start} to {stop}: {_LAYOUT_CHANGED}")


_LAYOUT_CHANGED = "DeepSpeed keeps it elsewhere than version 0.19.8 does: install that version, or a newer lordo_ds"


def _held_elements(parameter: nn.Parameter, interval: Interval) -> Tensor:
    """Elements [start, stop) of the model's copy; at stage 3 they are this rank's partition."""
    start, stop = interval
    partition = getattr(parameter, "ds_tensor", None)
    if partition is not None:
        held: Tensor = partition.detach().view(-1)
        return held[: stop - start]
    return parameter.detach().reshape(-1)[start:stop]


def _full_shape(parameter: nn.Parameter) -> Sequence[int]:
    return getattr(parameter, "ds_shape", parameter.shape)


# -- what else must be known of the wrappers ---------------------------------------------------------


def stepped_tensors(engine: Any) -> list[Tensor]:
    """What the engine's base optimizer steps, in the order in which DeepSpeed saves it."""
    return [one.tensor for one in _stepped_tensors(engine)]


def held_intervals(engine: Any) -> dict[nn.Parameter, Interval]:
    """The elements [start, stop) of each stepped parameter that this rank steps."""
    return {place.parameter: place.held for one in _stepped_tensors(engine) for place in one.places}


def shard_groups(engine: Any) -> list[dist.ProcessGroup]:
    """The process groups that DeepSpeed shards the stepped tensors over; none at stage 0, but for bf16 pipelines."""
    return [one.group for one in _stepped_tensors(engine) if one.group is not None]


def is_offloaded(engine: Any) -> bool:
    """Whether DeepSpeed keeps the stepped tensors on the host, apart from the device that trains."""
    wrapper = engine.optimizer
    return bool(getattr(wrapper, "cpu_offload", False) or getattr(wrapper, "offload_optimizer", False))


@contextmanager
def stepped_tensors_in_groups(engine: Any) -> Iterator[None]:
    """Fill the base optimizer's parameter groups for a block; ZeRO-3 keeps them empty between steps."""
    wrapper = engine.optimizer
    if type(wrapper) is not DeepSpeedZeroOptimizer_Stage3:
        yield
        return
    wrapper._set_fp32_optimizer_param_groups()
    try:
        yield
    finally:
        wrapper._clear_fp32_optimizer_param_groups()


def gradient_bytes(engine: Any) -> int:
    """Bytes of all gradients of one full model."""
    return sum(numel * dtype.itemsize for dtype, numel in _gradient_elements(engine).items())


def gradient_dtype(engine: Any) -> torch.dtype:
    """Of most of them."""
    return _gradient_elements(engine).most_common(1)[0][0]


def _gradient_elements(engine: Any) -> Counter[torch.dtype]:
    found = Counter[torch.dtype]()
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            found[parameter.dtype] += getattr(parameter, "ds_numel", parameter.numel())
    return found
