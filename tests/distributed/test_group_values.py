"""Values of parameter groups that one replica changes on its way: compared at every sync, named on all ranks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lordo_ds import LoRDO
from lordo_ds.errors import SyncError
from tests.ranks import run_ranks


def end_of(change: dict[str, Any], skip: tuple[int, int] | None, replica_size: int = 1) -> str:
    """How a run ends in which the last replica changes its second group at step 4. Syncs at 3, 6 and 9."""
    rank = dist.get_rank()
    replica, replicas = rank // replica_size, dist.get_world_size() // replica_size
    a, b = nn.Parameter(torch.ones(6, 8)), nn.Parameter(torch.ones(8, 6))
    groups = [{"params": [("a", a)]}, {"params": [("b", b)], "weight_decay": 0.1, "lr": torch.tensor(1e-2)}]
    optimizer = LoRDO(groups, rank=2, sync_interval=3, replica_size=replica_size)
    optimizer._attach_alone()
    optimizer.managed = True
    for step in range(1, 10):
        if step == 4 and replica == replicas - 1:
            optimizer.param_groups[1].update(change)
        for i, parameter in enumerate((a, b)):
            generator = torch.Generator().manual_seed(100 * step + 10 * replica + i)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if (step, replica) != skip:
            optimizer.step()
        try:
            optimizer.end_attempt()
        except SyncError as error:
            return str(error)
    return ""


def ends() -> dict[str, str]:
    logging.getLogger("lordo_ds").setLevel(logging.CRITICAL)
    changes: dict[str, dict[str, Any]] = {
        "none": {},
        "lr": {"lr": torch.tensor(2e-2)},
        "same": {"lr": 0.009999999776482582},
        "weight decay": {"weight_decay": 0.2},
        "betas": {"betas": (0.9, 0.99)},
        "eps": {"eps": 1e-6},
    }
    found = {case: end_of(change, None) for case, change in changes.items()}
    # After a skipped step a schedule of one's own may lag behind: said, but no reason to end.
    found["lr after a skip"] = end_of(changes["lr"], (2, 0))
    found["two ranks each"] = end_of(changes["weight decay"], None, replica_size=2)
    return found


@pytest.mark.distributed
def test_groups_that_one_replica_changes_stop_all_by_name_with_values() -> None:
    ranks = run_ranks(ends, 4, timeout_s=60)
    expected = {
        "none": "",
        "lr": "lr of the parameter group of b is 0.01 on replicas [0, 1, 2], 0.02 on replicas [3] at step 6",
        "same": "",
        "weight decay": "weight_decay of the parameter group of b is 0.1 on replicas [0, 1, 2], 0.2 on replicas [3]",
        "betas": "beta2 of the parameter group of b is 0.999 on replicas [0, 1, 2], 0.99 on replicas [3]",
        "eps": "eps of the parameter group of b is 1e-08 on replicas [0, 1, 2], 1e-06 on replicas [3]",
        "lr after a skip": "",
        "two ranks each": "weight_decay of the parameter group of b is 0.1 on replicas [0], 0.2 on replicas [1]",
    }
    for found in ranks:
        assert found == ranks[0]
        for case, part in expected.items():
            assert part in found[case] if part else not found[case], f"{case}: {found[case]}"
