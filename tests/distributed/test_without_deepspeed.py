"""The optimizer alone needs torch only: everything here runs in processes that cannot import DeepSpeed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]

RANK = """
import sys
for name in ("deepspeed", "megatron", "transformers", "accelerate", "torchft"):
    sys.modules[name] = None  # importing it raises ImportError

import torch
import torch.distributed as dist
import lordo_ds

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
optimizer = lordo_ds.LoRDO(model.named_parameters(), lr=1e-2, rank=2, sync_interval=2)
start = model[0].weight.detach().clone()
for step in range(2):
    optimizer.zero_grad()
    model(torch.randn(16, 8, generator=torch.Generator().manual_seed(10 * step + rank))).square().mean().backward()
    optimizer.step()
assert optimizer.synced and not torch.equal(start, model[0].weight)
both = [torch.empty_like(start) for _ in range(2)]
dist.all_gather(both, model[0].weight.detach())
assert torch.equal(*both)
try:
    lordo_ds.save_checkpoint
except AttributeError as error:
    assert "lordo_ds[deepspeed]" in str(error)
else:
    raise AssertionError("save_checkpoint takes a DeepSpeed engine")
dist.destroy_process_group()
print("synced")
"""


def test_the_optimizer_alone_trains_and_syncs_where_deepspeed_cannot_be_imported(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    assert all(text.strip().endswith("synced") for text in said)
