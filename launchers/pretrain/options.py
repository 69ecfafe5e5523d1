"""The options of `pretrain_gpt.py`, and the DeepSpeed JSON that they name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pretrain.launch import ArgumentParser, say
from pretrain.restart import RESUME_CHOICES

DEFAULT_STEPS = 300


def parse_arguments(description: str) -> argparse.Namespace:
    parser = ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--deepspeed_config", required=True, metavar="JSON", help="DeepSpeed settings, as in configs/ds/")
    add("--model", required=True, metavar="YAML", help="model size, as in configs/model/")
    add("--output-dir", required=True, type=Path, metavar="DIR")
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="text or jsonl files, or the PREFIX of what lordo data has made; default: the embedded corpus",
    )
    add("--train-steps", type=int, metavar="N", help="default: the JSON scheduler's total_num_steps")
    add("--seed", type=int, default=1234)
    add("--eval-interval", type=int, default=100, metavar="N", help="steps; 0: at the end only")
    add("--eval-samples", type=int, default=128, metavar="N", help="sequences in an evaluation")
    add("--save-interval", type=int, default=0, metavar="N", help="steps; 0: at the end only")
    add("--keep-saves", type=int, default=0, metavar="N", help="delete older ones than the last N; 0: keep all")
    add(
        "--resume",
        nargs="?",
        const="always",
        choices=RESUME_CHOICES,
        help="go on from the latest checkpoint in DIR; auto: if there is one",
    )
    add("--tensor-parallel", type=int, default=1, metavar="N", help="ranks that share every matrix")
    add("--pipeline-parallel", type=int, default=1, metavar="N", help="stages that the layers are divided over")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    args = parser.parse_args()
    least = {"train_steps": 1, "eval_samples": 1, "eval_interval": 0, "save_interval": 0, "keep_saves": 0}
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {minimum}")
    return args


def read_deepspeed_config(args: argparse.Namespace) -> dict[str, Any]:
    """The JSON, TensorBoard pointed at the output directory, its schedule long enough; sets train_steps."""
    path = Path(args.deepspeed_config)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; see configs/ds/ for the settings that come") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    blocks = ("optimizer", "scheduler", "tensorboard", "bf16", "fp16")
    if not isinstance(config, dict) or not all(isinstance(config.get(key, {}), dict) for key in blocks):
        raise ValueError(f"{path}: must be a JSON object, its {', '.join(blocks)} too; see configs/ds/adamw_ddp.json")
    board = {"enabled": True, "job_name": "tensorboard", **config.get("tensorboard", {})}
    config["tensorboard"] = {**board, "output_path": str(args.output_dir)}
    schedule = config.get("scheduler", {}).get("params", {})
    planned = schedule.get("total_num_steps")
    if args.train_steps is None:
        args.train_steps = planned or DEFAULT_STEPS
    elif planned and args.train_steps > planned:
        # Past its end a schedule rests at its floor and trains little. A shorter run keeps it: it may go on.
        say(f"the learning-rate schedule of {planned} steps is stretched to --train-steps {args.train_steps}")
        schedule["total_num_steps"] = args.train_steps
    return config
