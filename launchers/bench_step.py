"""Times the training step and the optimizer step of LoRDO against AdamW, on one model and in one run.

    python launchers/bench_step.py --model configs/model/gpt_16m.yaml --output bench.json

It starts the processes itself, anew for every number of them and ZeRO stage. In them all optimizers train the same
weights on the same random tokens, one step each in turn; a ratio is the median over such rounds. As many rounds
follow with clocks inside the optimizer step, which slow the step on a GPU. Without a GPU, seconds are CPU time.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from pretrain.gpt import GptConfig, build_gpt, loss_sums
from pretrain.launch import (
    ArgumentParser,
    choose_device,
    dist_rank,
    one_line_errors,
    seed_everything,
    start_distributed,
)
from pretrain.launch import shut_down as leave_together
from trials.bench import clocked, gpu_count, peak, provenance, reset_peak, run_processes, seconds
from trials.contender import BASELINES, PARTS, SYNC_INTERVAL, Contender, summary, table, take_the_busiest

RANK, SEED, LR = "1/8", 1234, 1e-4
WARM_UP_STEPS = 3  # the first one finds the first basis


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="configs/model/gpt_16m.yaml", metavar="YAML", help="default: %(default)s")
    add("--stages", nargs="+", type=int, default=[0, 1, 2, 3], choices=[0, 1, 2, 3])
    add("--processes", nargs="+", type=int, default=[1, 2], metavar="N", help="default: 1 2")
    add("--steps", type=int, default=16, metavar="N", help="timed rounds; default: %(default)s")
    add("--micro-batch", type=int, default=1, metavar="N", help="sequences per process; default: %(default)s")
    add("--seq-length", type=int, metavar="N", help="default: the model's")
    add("--bf16", action="store_true")
    add("--output", type=Path, required=True, metavar="JSON")
    add("--part", type=Path, help=argparse.SUPPRESS)  # this is one of the processes; its result goes there
    args = parser.parse_args()
    for name, least in (("steps", 6), ("micro_batch", 1), ("seq_length", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if min(args.processes) < 1:
        raise ValueError(f"--processes {min(args.processes)}: must be at least 1")
    return args


# -- the processes -----------------------------------------------------------------------------------


def run_part(args: argparse.Namespace) -> None:
    """One ZeRO stage, in the processes that exist."""
    choose_device()
    start_distributed(1, 1, SEED)
    import torch
    from deepspeed.accelerator import get_accelerator

    model = GptConfig.from_yaml(args.model)
    length = min(args.seq_length or model.seq_length, model.seq_length)
    generator = torch.Generator().manual_seed(SEED + dist_rank())
    tokens = torch.randint(model.vocab_size, (args.micro_batch, length + 1), generator=generator)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.ones(args.micro_batch, length)}
    batch = {key: value.to(get_accelerator().current_device_name()) for key, value in batch.items()}
    logging.getLogger("lordo_ds").setLevel(logging.WARNING)
    configs = deepspeed_configs(args)
    # What a process loads and keeps at its first step must not count as one contender's memory.
    warmed_up(model, configs[BASELINES[0]], batch, args.bf16).engine.destroy()
    contenders = {name: warmed_up(model, config, batch, args.bf16) for name, config in configs.items()}
    for turn in range(2 * args.steps):
        # Another one begins each round: who runs after whom must not matter.
        names = list(contenders)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            timed_step(contenders[name], batch, with_clocks=turn >= args.steps)
    for one in contenders.values():
        take_the_busiest(one)
    if dist_rank() == 0:
        on_gpu = get_accelerator().device_name() == "cuda"
        part = {
            "processes": args.processes[0],
            "stage": args.stages[0],
            "tokens_per_process_and_step": args.micro_batch * length,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "threads_per_process": torch.get_num_threads(),
            "contenders": {name: summary(one, contenders) for name, one in contenders.items()},
        }
        args.part.write_text(json.dumps(part))
    leave_together()


def deepspeed_configs(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings by contender."""
    lordo = {"lr": LR, "rank": RANK, "sync_interval": args.steps // 2, "replica_size": "all"}
    adamw = {"lr": LR, "weight_decay": 0.0, "torch_adam": not deepspeed_adam_builds()}
    optimizers: dict[str, dict[str, Any]] = {
        BASELINES[0]: {},
        BASELINES[1]: {"optimizer": {"type": "AdamW", "params": adamw}},
        "LoRDO paper": {"optimizer": {"type": "LoRDO", "params": {**lordo, "preset": "paper"}}},
        "LoRDO recommended": {"optimizer": {"type": "LoRDO", "params": {**lordo, "preset": "recommended"}}},
    }
    if args.processes[0] > 1:
        alone = {**lordo, "preset": "paper", "replica_size": 1}
        optimizers["LoRDO paper, replicas of 1"] = {"optimizer": {"type": "LoRDO", "params": alone}}
    common = {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.stages[0]},
        "bf16": {"enabled": args.bf16},
        "steps_per_print": 10**9,
    }
    return {name: {**common, **optimizer} for name, optimizer in optimizers.items()}


def deepspeed_adam_builds() -> bool:
    """Whether DeepSpeed's own fused AdamW can be compiled; if not it has torch's plain one."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import FusedAdamBuilder

    if get_accelerator().device_name() == "cpu":
        return False
    try:
        FusedAdamBuilder().load(verbose=False)
    except Exception:  # no compiler, another CUDA than torch's: there are many ways
        return False
    return True


def warmed_up(model: GptConfig, config: dict[str, Any], batch: dict[str, Any], bf16: bool) -> Contender:
    """Build the engine, take its first steps and a sync; the peak is of memory beyond what was in use before."""
    import deepspeed
    import torch

    import lordo_ds

    before = reset_peak()
    seed_everything(SEED)
    module = build_gpt(model, torch.bfloat16 if bf16 else torch.float32)
    parameters = list(module.parameters())
    client = None if "optimizer" in config else torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=parameters, optimizer=client, config=config)
    one = Contender(engine)
    for _ in range(WARM_UP_STEPS):
        train_step(one, batch)
    hook = lordo_ds.hook(engine)
    if hook is not None:
        hook.finish()
    one.peak_bytes = None if before is None else peak() - before
    one.state_bytes = lordo_ds.status(engine)["state_bytes"] if hook else adamw_bytes(engine.basic_optimizer)
    return one


def train_step(one: Contender, batch: dict[str, Any]) -> None:
    total, count = loss_sums(one.engine, batch)
    loss = total / count
    one.engine.backward(loss)
    one.engine.step()
    one.losses.append(float(loss.detach()))


def timed_step(one: Contender, batch: dict[str, Any], with_clocks: bool) -> None:
    import torch.distributed as dist

    import lordo_ds

    spent: Counter[str] = Counter()
    dist.barrier()
    wall, began = time.perf_counter(), seconds()
    with clocks(one, spent) if with_clocks else ExitStack():
        train_step(one, batch)
    took = seconds() - began
    dist.barrier()
    if with_clocks:
        one.parts.append(spent)
    else:
        one.steps.append(took)
        one.wall.append(time.perf_counter() - wall)
    hook = lordo_ds.hook(one.engine)
    one.synced.append(hook is not None and hook.synced)


@contextmanager
def clocks(one: Contender, spent: Counter[str]) -> Iterator[None]:
    """Clock the base optimizer's step, the parts of LoRDO's, and its sync."""
    from lordo_ds.replica import inner_step, steps
    from lordo_ds.replica.bases import Bases
    from lordo_ds.sync.outer_sync import OuterSync

    places = [(kind, inner_step, name) for kind, names in PARTS.items() for name in names]
    places += [("dense AdamW", steps, "adamw_step_"), ("optimizer", one.engine.basic_optimizer, "step")]
    places += [("sync", OuterSync, "run"), ("refresh", Bases, "refresh")]
    with ExitStack() as stack:
        for kind, owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, clocked(getattr(owner, name), kind, spent)))
        yield


def adamw_bytes(optimizer: Any) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for state in optimizer.state.values():
        kinds.update({key: state[key].numel() * state[key].element_size() for key in ("exp_avg", "exp_avg_sq")})
    return dict(kinds)


# -- the run -----------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Every part in processes of its own; the result file grows with each."""
    GptConfig.from_yaml(args.model)  # a mistake in it shows before anything is started
    given = {key: value for key, value in vars(args).items() if key not in ("part", "output")}
    constants = {"rank": RANK, "warm_up_steps": WARM_UP_STEPS, "a_sync_every_steps": SYNC_INTERVAL}
    result = {**provenance(), "settings": {**given, **constants}, "parts": (parts := [])}
    gpus = gpu_count()
    for processes in args.processes:
        if gpus and processes > gpus:
            print(f"{processes} processes need as many GPUs, here are {gpus}: left out", flush=True)
            continue
        for stage in args.stages:
            parts.append(run_in_processes(processes, stage))
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            print(table(parts[-1]), flush=True)


def run_in_processes(processes: int, stage: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        own = ["--processes", str(processes), "--stages", str(stage), "--part", str(path)]
        run_processes(processes, __file__, [*sys.argv[1:], *own])  # of an option given twice the last counts
        return json.loads(path.read_text())


def main() -> None:
    with one_line_errors("bench_step.py"):
        args = parse_arguments()
        if args.part is None:
            run(args)
    if args.part is not None:
        run_part(args)


if __name__ == "__main__":
    main()
