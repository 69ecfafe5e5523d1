"""The process around a training script: its rank, how it reports a user's mistake, its device and groups."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


def dist_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def say(line: str) -> None:
    """Print on rank 0."""
    if dist_rank() == 0:
        print(line, flush=True)


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong option is a `ValueError` of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the options)")


def one_line(error: ValueError) -> str:
    """Its message, line breaks (pydantic's, say) taken out."""
    return " ".join(str(error).split())


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End the process on a user's mistake (`ValueError`) with exit code 2 and one line on stderr.

    Rank 0 speaks; the others, which made the same mistake, are ended by the launcher before they would. With
    LORDO_TRACEBACK=1 the error comes with its traceback.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("LORDO_TRACEBACK"):
            raise
        if dist_rank():
            time.sleep(5)  # whoever lives on after that made a mistake that rank 0 did not make
        where = f" on rank {dist_rank()}" if dist_rank() else ""
        print(f"{program}: error{where}: {one_line(error)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if "lordo_ds.watch.watchdog" in sys.modules:
            sys.modules["lordo_ds.watch.watchdog"].tell_the_others(error)
        os._exit(2)  # not sys.exit, which may wait for a process group whose other half is gone


def choose_device() -> None:
    """Settle what torch and DeepSpeed read from the environment when they are imported.

    Raises:
        ValueError: GPUs are there, nothing hides them, and torch cannot use them.
    """
    warnings.filterwarnings("ignore", module="megatron")
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if not torch.cuda.is_available():
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ or "DS_ACCELERATOR" in os.environ
        if not hidden and any(Path("/dev").glob("nvidia[0-9]*")):
            raise ValueError(
                f"this machine has NVIDIA GPUs that torch {torch.__version__} cannot use: install a torch for its "
                "driver, or set DS_ACCELERATOR=cpu to train on the CPU"
            )
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    if "RANK" not in os.environ:  # no launcher
        os.environ.update({key: str(value) for key, value in alone.items()})


def device_in_words() -> str:
    """What this rank trains on, once DeepSpeed has chosen."""
    import torch
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    return torch.cuda.get_device_name() if name == "cuda" else f"the {name.upper()}"


def start_distributed(tensor_parallel: int, pipeline_parallel: int, seed: int) -> None:
    """The process group, Megatron's groups and the seeds, equal on all ranks.

    Where there is no CUDA, the CPU takes its place in Megatron.
    """
    import logging

    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    deepspeed.logger.setLevel(logging.ERROR)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("lordo_ds").setLevel(logging.WARNING if dist_rank() else logging.INFO)
    if get_accelerator().device_name() == "cpu":
        # A shared-memory all-reduce that training never calls, and that takes over a minute to compile.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    join_group_of_this_attempt(get_accelerator().communication_backend_name())
    deepspeed.init_distributed(verbose=False)

    from megatron.core import parallel_state

    from megatron_patches import cpu

    cpu.install()
    parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel, create_gloo_process_groups=False)
    seed_everything(seed)


def join_group_of_this_attempt(backend: str) -> None:
    """Under torchrun, keep a restarted job from reading the addresses that the crashed one left in the agent's store.

    torch 2.5 to 2.13 keep one store for all attempts (pytorch issue 135712). The count of restarts keeps them apart,
    on one node; agents on several nodes count apart from each other, and need a store for each attempt.
    """
    import torch.distributed as dist

    restarts, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if not most or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    world = int(os.environ["WORLD_SIZE"])
    if int(os.environ["LOCAL_WORLD_SIZE"]) < world:
        say(
            "torchrun keeps one store for all attempts: after a crash the ranks will not find each other; "
            "start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --rdzv-backend=c10d"
        )
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore(f"attempt_{restarts}", dist.TCPStore(address, port, is_master=False))
    dist.init_process_group(backend, store=store, rank=dist_rank(), world_size=world)


def seed_everything(seed: int) -> None:
    import random

    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)  # last: without CUDA the line above has moved the same generator


def check_equal_on_all_ranks(value: Any, message: str) -> None:
    """Collective.

    Raises:
        ValueError: `message`, preceded by the ranks whose value is not that of rank 0.
    """
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    different = [str(rank) for rank, other in enumerate(values) if other != values[0]]
    if different:
        raise ValueError(f"rank {', '.join(different)}: {message}")


def shut_down() -> None:
    """Leave together: a rank that goes early takes the store of the others with it."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
