"""torchft's own DiLoCo and Streaming DiLoCo on the model and data of `pretrain_gpt.py`; `bench_network.py` starts it.

One replica a host. The inner optimizer is torch's AdamW, at one learning rate, and the outer one that of
configs/ds/diloco.json. Of DeepSpeed there is the launcher only, so a step's computation is lighter than DeepSpeed's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

from pretrain.gpt import GptConfig, build_gpt, loss_sums
from pretrain.launch import ArgumentParser, choose_device, one_line_errors, start_distributed
from pretrain.text import BatchShape, SampleOrder, open_datasets, train_batches
from trials.machine import ROOT
from trials.pacer import PACE, Pacer

_STORE_PORT, _LIGHTHOUSE_PORT = 29_600, 29_601  # of a host that has nothing else
_TIMEOUT = timedelta(minutes=15)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, type=Path)
    add("--train-steps", required=True, type=int)
    add("--seed", required=True, type=int)
    add("--sync-interval", type=int, default=32, help="steps after which every fragment has been averaged")
    add("--fragments", type=int, default=1)
    add("--delay-steps", type=int, default=0, help="between a fragment's departure and its application")
    add("--quantize", type=json.loads, default=False)
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    args = parser.parse_args()
    if args.quantize:
        require_quantization()
    return args


def require_quantization() -> None:
    """torchft 0.2 sends fp32, and does not say so, where it cannot quantize.

    Raises:
        ValueError: here it cannot.
    """
    import importlib.util

    import torch

    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        raise ValueError("torchft's fp8 wire is Triton kernels on a CUDA stream: it needs triton and a GPU")


class Replica:
    """This replica's place among them, and torchft's manager; to torch.distributed it is a world of one rank."""

    def __init__(self) -> None:
        import torch.distributed as dist
        import torchft
        from torchft.coordination import LighthouseServer

        self.number, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        first, here = os.environ["MASTER_ADDR"], _own_address(os.environ["MASTER_ADDR"])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        self._lighthouse = None
        if self.number == 0:
            self._lighthouse = LighthouseServer(bind=f"0.0.0.0:{_LIGHTHOUSE_PORT}", min_replicas=self.count)
        self._store = dist.TCPStore(here, _STORE_PORT, is_master=True, wait_for_workers=False)
        self.manager = torchft.Manager(
            pg=torchft.ProcessGroupGloo(timeout=_TIMEOUT),
            load_state_dict=None,
            state_dict=None,
            min_replica_size=self.count,
            use_async_quorum=False,
            timeout=_TIMEOUT,
            quorum_timeout=_TIMEOUT,
            rank=0,
            world_size=1,
            store_addr=here,
            store_port=_STORE_PORT,
            lighthouse_addr=f"http://{first}:{_LIGHTHOUSE_PORT}",
            replica_id=f"replica_{self.number}",
            hostname=here,
            init_sync=False,  # all start from the same seed
        )
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def shut_down(self) -> None:
        self.manager.shutdown(wait=False)
        if self._lighthouse is not None:
            self._lighthouse.shutdown()


def _own_address(other: str) -> str:
    """That of the interface which leads to another host; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))
        return str(probe.getsockname()[0])


def fragments_of(model: Any, count: int) -> list[Any]:
    """The model's layers in `count` runs; what comes before them goes with the first, the rest with the last."""
    import torch

    layers = list(model.decoder.layers)
    if not 1 <= count <= len(layers):
        raise ValueError(f"--fragments {count}: must be between 1 and the model's {len(layers)} layers")
    if count == 1:
        return [model]
    bounds = [len(layers) * number // count for number in range(count + 1)]
    groups = [layers[start:stop] for start, stop in itertools.pairwise(bounds)]
    groups[0].insert(0, model.embedding)
    groups[-1].append(model.decoder.final_layernorm)
    fragments = [torch.nn.ModuleList(group) for group in groups]
    held = [id(parameter) for fragment in fragments for parameter in fragment.parameters()]
    assert sorted(held) == sorted(map(id, model.parameters())), "a parameter is in no fragment, or in two"
    return fragments


def train(args: argparse.Namespace, pacer: Pacer, replica: Replica, model: Any, batches: Any, tokens: int) -> None:
    """All steps of the plan; `tokens` are those of one step of all replicas."""
    import torch
    from torchft.local_sgd import DiLoCo

    settings = json.loads((ROOT / "configs" / "ds" / "diloco.json").read_text())
    params = settings["optimizer"]["params"]
    inner = torch.optim.AdamW(model.parameters(), lr=params["lr"], betas=params["betas"], weight_decay=0.0)
    fragments = fragments_of(model, args.fragments)
    outer = [torch.optim.SGD(fragment.parameters(), **params["outer"]) for fragment in fragments]
    with DiLoCo(
        replica.manager,
        fragments,
        inner,
        outer,
        sync_every=args.sync_interval,
        should_quantize=args.quantize,
        fragment_sync_delay=args.delay_steps,
    ):
        for step in range(1, args.train_steps + 1):
            pacer.pause_after(step - 1)
            total, count = loss_sums(model, next(batches))
            inner.zero_grad()
            (total / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["gradient_clipping"])
            inner.step()  # DiLoCo's hooks on it sync
            pacer.note_step(step, step * tokens)
        pacer.pause_after(args.train_steps)


def main() -> None:
    with one_line_errors("torchft_gpt.py"):
        args = parse_arguments()
        model_config = GptConfig.from_yaml(args.model)
        choose_device()
        from lordo_ds.data import prepare

        data = prepare([], model_config.vocab_size)
        samples, _, _ = open_datasets(data, model_config.seq_length, args.seed)
        replica = Replica()
        start_distributed(1, 1, args.seed)
    import torch

    model = build_gpt(model_config, torch.float32)
    micro_batch = json.loads((ROOT / "configs" / "ds" / "diloco.json").read_text())["train_micro_batch_size_per_gpu"]
    shape = BatchShape(micro_batch, 1, replica.count, replica.number)
    order = SampleOrder(len(samples), args.seed)
    firsts = itertools.count(0, shape.global_batch)
    batches = (batch for first in firsts for batch in train_batches(samples, order, shape, first, torch.device("cpu")))
    pacer = Pacer(Path(os.environ[PACE]), replica.number)
    train(args, pacer, replica, model, batches, shape.global_batch * model_config.seq_length)
    replica.shut_down()


if __name__ == "__main__":
    main()
