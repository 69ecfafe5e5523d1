"""LoRDO under PyTorch's `fully_shard`, without an engine: a small byte-level transformer on replicas of sharded ranks.

    torchrun --nproc-per-node 4 launchers/fsdp2_example.py --shards 2        # 2 replicas of 2 ranks

Every rank reads bytes of its own from this Python's library; replicas average every 8 steps.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lordo_ds

SEQUENCE, WIDTH, BATCH = 64, 64, 8


class Gpt(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(SEQUENCE, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.lm_head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """The loss of (batch, SEQUENCE + 1) bytes, each predicted from those before it."""
        mask = nn.Transformer.generate_square_subsequent_mask(SEQUENCE, device=text.device)
        hidden = self.tokens(text[:, :-1]) + self.positions.weight
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.lm_head(hidden).flatten(0, 1), text[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1, help="ranks of one replica")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    dist.init_process_group()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = lordo_ds.replica_mesh(device, arguments.shards)
    model = Gpt().to(device)
    lordo_ds.shard_model(model, mesh, model.blocks)
    optimizer = lordo_ds.LoRDO(model, mesh=mesh, preset="recommended", lr=4e-3, rank="1/8", sync_interval=8)
    text = torch.frombuffer(bytearray(Path(ast.__file__).read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(1, arguments.steps + 1):
        starts = torch.randint(len(text) - SEQUENCE, (BATCH,), generator=generator)
        batch = torch.stack([text[start : start + SEQUENCE + 1] for start in starts.tolist()]).to(device)
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of this replica: its mesh is the shards
        optimizer.step()
        if dist.get_rank() == 0 and (step == 1 or optimizer.synced):
            sent = lordo_ds.status(optimizer)["bytes_sent_total"]
            print(f"step {step}: loss {loss.item():.3f}, {sent / 2**20:.2f} MiB sent to other replicas", flush=True)
    optimizer.final_sync()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
