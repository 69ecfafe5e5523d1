"""How long process groups wait before they give up, how far they have come, and how long the watchdog may wait."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import constants, distributed_c10d

logger = logging.getLogger("lordo_ds")

_MARGIN, _LARGEST_MARGIN_S = 0.2, 60.0
_LONGER = 3.0  # what a first step, which compiles, and a save or a load may take, in ordinary timeouts


@dataclass(frozen=True)
class Limits:
    """Seconds without progress in a step, in the first one and before it, and in a save or a load."""

    step_s: float
    first_step_s: float
    save_s: float

    @classmethod
    def of(cls, timeout_s: float, in_steps_s: float = math.inf, in_saves_s: float = math.inf) -> Limits:
        """Shorter than process groups wait, whose own errors do not tell which rank is to blame.

        Args:
            timeout_s: `sync_timeout_s`.
            in_steps_s, in_saves_s: after which the groups used there give up.
        """
        in_steps, in_saves = _room(in_steps_s), _room(min(in_steps_s, in_saves_s))
        return cls(min(timeout_s, in_steps), min(_LONGER * timeout_s, in_steps), min(_LONGER * timeout_s, in_saves))


def _room(timeout_s: float) -> float:
    return timeout_s if math.isinf(timeout_s) else timeout_s - min(_MARGIN * timeout_s, _LARGEST_MARGIN_S)


def limits_of_groups(timeout_s: float, groups: Sequence[dist.ProcessGroup | None]) -> Limits:
    """For these groups, in steps, and the one of all ranks, in saves; what shortens them is said."""
    known = [timeout_of(group) for group in groups if group is not None and dist.get_world_size(group) > 1]
    world_s = timeout_of(dist.group.WORLD)
    seconds = [one for one in (*known, world_s) if one is not None]
    if len(seconds) <= len(known):
        logger.warning(
            "LoRDO: a process group does not tell its timeout: let it be longer than optimizer.params.sync_timeout_s "
            "= %g, or it may end the run before it is known which rank is to blame",
            timeout_s,
        )
    in_steps = min((one for one in known if one is not None), default=math.inf)
    limits = Limits.of(timeout_s, in_steps, world_s or math.inf)
    if limits.step_s < timeout_s:
        logger.info(
            "LoRDO: optimizer.params.sync_timeout_s = %g: the process groups give up after %g s, so %g s are used: "
            "give init_process_group a longer timeout (DeepSpeed: DEEPSPEED_TIMEOUT, in minutes) for more",
            timeout_s, in_steps, limits.step_s,
        )  # fmt: skip
    return limits


def timeout_of(group: dist.ProcessGroup | None) -> float | None:
    """Seconds after which a collective fails; None where it cannot be read."""
    try:
        backends = [group._get_backend(device) for device in group._device_types]  # type: ignore[union-attr]
        return min(backend.options._timeout.total_seconds() for backend in backends)
    except (AttributeError, RuntimeError, ValueError):  # a backend without options, or without a device here
        return None


def timeout_for_new_groups() -> timedelta | None:
    """Where the group of all ranks was given a longer one than torch's default, that; torch would not pass it on."""
    world_s = timeout_of(dist.group.WORLD)
    default = constants.default_pg_nccl_timeout if "nccl" in dist.get_backend() else constants.default_pg_timeout
    if world_s is None or default is None or world_s <= default.total_seconds():
        return None
    return timedelta(seconds=world_s)


def same_ranks(groups: Iterable[dist.ProcessGroup | None]) -> list[str]:
    """Names of these groups of several ranks and of all that hold the same ranks, but the one of all ranks.

    An engine's own groups are among them. Ranks of one replica begin the same collectives in each, in the same order.
    """
    wanted = {frozenset(dist.get_process_group_ranks(group)) for group in groups if group is not None}
    return sorted(
        group.group_name
        for group in list(distributed_c10d._world.pg_map)
        if group is not dist.group.WORLD
        and dist.get_world_size(group) > 1
        and frozenset(dist.get_process_group_ranks(group)) in wanted
    )


def collectives_begun() -> dict[str, int]:
    """By group name: how many collectives this rank has begun in it. From any thread."""
    begun: dict[str, int] = {}
    for group in list(distributed_c10d._world.pg_map):  # a copy in one go: the main thread may make and destroy groups
        try:
            begun[group.group_name] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        except (RuntimeError, NotImplementedError):  # a backend that does not count
            continue
    return begun
