"""Wrappers of torch around the model or the optimizer, that average gradients or split states on their own."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lordo_ds.errors import ConfigError

_ZERO_MODULE = "torch.distributed.optim.zero_redundancy_optimizer"


def refuse_averaging(tensors: Collection[Tensor], replica: Sequence[int]) -> None:
    """Refuse a DistributedDataParallel that reaches over this replica.

    A parameter does not tell that a DistributedDataParallel will reduce its gradient: the hook is in C++. So all live
    ones are looked for, once, among the objects that the garbage collector knows.

    Args:
        replica: dist_ranks of this replica: a DistributedDataParallel over these is as it should be.

    Raises:
        ConfigError: naming what was found, its ranks, and what to do.
    """
    for wrapper in _live([DistributedDataParallel]):
        ranks = _ranks(wrapper, tensors)
        if not set(ranks) <= set(replica):
            raise ConfigError(
                f"LoRDO: a DistributedDataParallel averages gradients over ranks {ranks} at every step, and the "
                f"replica is {list(replica)}: train the model without it (LoRDO averages the replicas itself), or "
                "give it the replica's ranks as process_group"
            )


def refuse_splitting(optimizer: object) -> None:
    """Refuse a ZeroRedundancyOptimizer around this one.

    Raises:
        ConfigError: with what to do.
    """
    module = sys.modules.get(_ZERO_MODULE)
    for wrapper in _live([module.ZeroRedundancyOptimizer] if module is not None else []):
        if getattr(wrapper, "optim", None) is optimizer:
            raise ConfigError(
                "LoRDO: a ZeroRedundancyOptimizer gives every rank other parameters, and replicas need the same: use "
                "LoRDO without it (its state is small)"
            )


def _live(classes: Sequence[type]) -> Iterator[Any]:
    """The objects of these classes that exist, and are more than garbage."""
    kinds = set(classes)
    for kind in classes:
        kinds |= _subclasses(kind)
    # By type(): isinstance would run the code of proxies among all objects.
    if any(type(found) in kinds for found in gc.get_objects()):
        gc.collect()
        yield from (found for found in gc.get_objects() if type(found) in kinds)


def _subclasses(kind: type) -> set[type]:
    direct: set[type] = set(kind.__subclasses__())
    return direct.union(*map(_subclasses, direct))


def _ranks(wrapper: Any, tensors: Collection[Tensor]) -> list[int]:
    """The ranks that it averages gradients of our tensors over."""
    module = wrapper.__dict__.get("_modules", {}).get("module")
    if module is None or not any(parameter in tensors for parameter in module.parameters()):
        return []
    return list(dist.get_process_group_ranks(wrapper.process_group))
