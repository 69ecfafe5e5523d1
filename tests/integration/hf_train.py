"""A Hugging Face `Trainer` run as its users write it; which optimizer trains is up to the DeepSpeed JSON.

    torchrun --nproc_per_node 2 hf_train.py --deepspeed ds.json --output_dir DIR [any other training argument]

A tiny Llama with random weights learns sentences of a small grammar on the CPU.
"""

from __future__ import annotations

import sys

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig, Trainer, TrainingArguments, set_seed

import lordo_ds  # noqa: F401

VOCABULARY, LENGTH = 64, 16

DEFAULTS = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "max_steps": 11,
    "learning_rate": 2e-2,
    "warmup_steps": 2,
    "weight_decay": 0.01,
    "logging_steps": 1,
    "save_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "report_to": "none",
    "disable_tqdm": True,
}


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Each token is followed by one of two; `read` are the samples that this process asked for."""

    def __init__(self, size: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        tokens = [torch.randint(VOCABULARY, (size,), generator=draw)]
        while len(tokens) < LENGTH:
            tokens.append((5 * tokens[-1] + torch.randint(2, (size,), generator=draw)) % VOCABULARY)
        self.tokens = torch.stack(tokens, 1)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def main(argv: list[str]) -> Trainer:
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(**DEFAULTS)
    (args,) = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(config),
        args=args,
        train_dataset=Sentences(96, seed=5),
        eval_dataset=Sentences(16, seed=6),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
