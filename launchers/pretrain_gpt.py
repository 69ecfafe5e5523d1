"""Pre-train a Megatron-core GPT with DeepSpeed: the reference script for LoRDO and for every baseline.

    deepspeed --num_accelerators 2 launchers/pretrain_gpt.py \
        --deepspeed_config configs/ds/lordo.json --model configs/model/tiny.yaml --output-dir runs/tiny

Which optimizer runs is the JSON's business alone: the script is the same for all of them. torchrun works
too, and without a launcher it is one process. It leaves metrics.jsonl, loss.png, summary.json, a TensorBoard
run and checkpoints in the output directory.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.engine import PipelineTrainer, PlainTrainer, build_trainer, half_precision
from pretrain.gpt import GptConfig
from pretrain.launch import (
    check_equal_on_all_ranks,
    choose_device,
    device_in_words,
    dist_rank,
    one_line_errors,
    say,
    shut_down,
    start_distributed,
)
from pretrain.options import parse_arguments, read_deepspeed_config
from pretrain.output_dir import check_claim, claimed
from pretrain.parallel import check_parallel_sizes, elements_here, elements_in_all
from pretrain.restart import drop_saves, load_checkpoint, saves_up_to, write_rows_that_nobody_averages
from pretrain.run_log import EveryStepHook, Hook, Row, RunLog, megabytes, times_less
from pretrain.text import (
    BatchShape,
    SampleOrder,
    Samples,
    open_datasets,
    train_batches,
    validation_batch_count,
    validation_batches,
)

SAY_EVERY = 10  # steps


@dataclass
class Job:
    """Everything that the training loop uses."""

    args: argparse.Namespace
    model: GptConfig
    trainer: PlainTrainer | PipelineTrainer
    hook: Hook
    group: Any
    """All data-parallel ranks, of all replicas."""
    train: Samples
    valid: Samples
    order: SampleOrder
    shape: BatchShape
    seq_length: int
    unigram_perplexity: float
    log: RunLog
    ddp_bytes: int
    """What AdamW-DDP sends across replicas per rank and step."""
    step: int
    consumed: int
    """Samples read by all ranks together since the first step."""
    saves: list[int]
    """Steps of this run's saves that are kept."""
    bytes_counted: int
    """How much of the hook's bytes_sent is in rows already; the first row takes what start-up sent."""
    seconds_counted: float
    """The same of its seconds_blocked."""
    started: float
    claim: Any
    """That of the output directory, on rank 0."""


def set_up(args: argparse.Namespace) -> Job:
    """From the command line to a job that can run; the user's mistakes show here."""
    started = time.perf_counter()
    config = read_deepspeed_config(args)
    model_config = GptConfig.from_yaml(args.model)
    choose_device()
    check_parallel_sizes(model_config, args.tensor_parallel, args.pipeline_parallel)
    from lordo_ds import LordoConfig
    from lordo_ds.data import prepare

    optimizer = config.get("optimizer", {})
    if str(optimizer.get("type")).lower() == "lordo":
        LordoConfig.parse(optimizer.get("params", {}))  # a misspelt key need not wait for the data
    data = prepare(args.data, model_config.vocab_size, say=say)
    datasets = open_datasets(data, model_config.seq_length, args.seed)
    start_distributed(args.tensor_parallel, args.pipeline_parallel, args.seed)
    check_equal_on_all_ranks(
        data.key, "other data than rank 0: use the same files, Python and sentencepiece everywhere"
    )
    with claimed(args.output_dir) as claim:
        return build_job(args, config, model_config, data, datasets, started, claim)


def build_job(
    args: argparse.Namespace,
    config: dict[str, Any],
    model_config: GptConfig,
    data: Any,
    datasets: tuple[Samples, Samples, int],
    started: float,
    claim: Any,
) -> Job:
    """The engine, from scratch or from its checkpoint, and all else."""
    from lordo_ds.comm.agreement import agreed
    from lordo_ds.comm.ledger import data_parallel_bytes
    from lordo_ds.data import unigram_entropy

    train, valid, held_out = datasets
    trainer, hook, group = build_trainer(model_config, config, args.seed)
    engine = trainer.engine
    shape = BatchShape(
        micro_batch=engine.train_micro_batch_size_per_gpu(),
        accumulation=engine.gradient_accumulation_steps(),
        data_parallel_size=hook.data_parallel_size,
        data_parallel_rank=hook.data_parallel_rank,
    )
    model_parallel = args.tensor_parallel * args.pipeline_parallel
    say(
        f"{elements_in_all(engine.module):,} parameters, {data.tokens:,} tokens; {hook.replicas} replica(s) of "
        f"{shape.data_parallel_size // hook.replicas * model_parallel} rank(s); {args.train_steps} steps of "
        f"{shape.global_batch} x {model_config.seq_length} tokens, on {device_in_words()}"
    )
    client = load_checkpoint(args, engine, hook)
    step, rows, writes = client["step"], client["waiting_rows"], dist_rank() == 0
    log = agreed(lambda: RunLog(args.output_dir, writes, engine.monitor, step, rows))
    write_rows_that_nobody_averages(log, hook)
    return Job(
        args=args,
        model=model_config,
        trainer=trainer,
        hook=hook,
        group=group,
        train=train,
        valid=valid,
        order=SampleOrder(len(train), args.seed),
        shape=shape,
        seq_length=model_config.seq_length,
        unigram_perplexity=math.exp(unigram_entropy(data.validation_tokens(held_out))),
        log=log,
        ddp_bytes=data_parallel_bytes(
            elements_here(engine.module) * (2 if half_precision(engine) else 4),
            hook.replicas,
            shape.data_parallel_size // hook.replicas,
        ),
        step=step,
        consumed=client["consumed_samples"],
        saves=saves_up_to(args.output_dir / "checkpoints", step),
        bytes_counted=hook.bytes_sent if step else 0,
        seconds_counted=(hook.seconds_blocked or 0.0) if step else 0.0,
        started=started,
        claim=claim,
    )


def save_checkpoint(job: Job) -> None:
    """Collective. Rows that wait for a sync go along; the hook saves what is to be averaged."""
    check_claim(job.claim)
    if isinstance(job.hook, EveryStepHook):
        job.hook.flush()
    elif job.hook.drain() and job.hook.replicas > 1:
        job.log.last["bytes_replica"] += replica_bytes(job)
    job.log.flush(job.hook.averaged_rows())
    job.log.put_on_disk()
    client = {
        "step": job.step,
        "consumed_samples": job.consumed,
        "waiting_rows": job.log.waiting,
        "model": asdict(job.model),  # for `lordo ckpt export --format hf`
    }
    folder = job.args.output_dir / "checkpoints"
    job.trainer.engine.save_checkpoint(str(folder), f"global_step{job.step}", client_state=client)
    job.saves.append(job.step)
    if job.args.keep_saves:
        drop_saves(folder, job.saves[: -job.args.keep_saves])
        del job.saves[: -job.args.keep_saves]


def train_step(job: Job) -> Row:
    """One step on this rank's part of the global batch; the row's loss and norm are this rank's own."""
    began = time.perf_counter()
    engine = job.trainer.engine
    lr = engine.get_lr()[0]
    loss, norm = job.trainer.step(train_batches(job.train, job.order, job.shape, job.consumed, engine.device))
    job.step += 1
    job.consumed += job.shape.global_batch
    return {
        "step": job.step,
        "samples": job.consumed,
        "tokens": job.consumed * job.seq_length,
        "loss": loss,
        "lr": lr,
        "grad_norm": math.nan if norm is None else float(norm),
        "synced": job.hook.synced,
        "bytes_replica": replica_bytes(job),
        "bytes_ddp": job.ddp_bytes,
        "bytes_eval": 0,
        "seconds_blocked": replica_seconds(job),
        "tokens_per_s": job.shape.global_batch * job.seq_length / (time.perf_counter() - began),
    }


def replica_bytes(job: Job) -> int:
    """Sent across replicas by this rank since the last call; what DDP sends if all ranks are one replica."""
    if job.hook.replicas == 1:
        return job.ddp_bytes
    before, job.bytes_counted = job.bytes_counted, job.hook.bytes_sent
    return job.bytes_counted - before


def replica_seconds(job: Job) -> float | None:
    """For which what crosses replicas blocked this rank since the last call; None where all ranks are one replica."""
    if job.hook.seconds_blocked is None:
        return None
    before, job.seconds_counted = job.seconds_counted, job.hook.seconds_blocked
    return job.seconds_counted - before


def evaluate(job: Job) -> float:
    """Mean validation loss, each rank with its weights on its part of the samples; noted in the last row."""
    import torch.distributed as dist

    from lordo_ds.comm.ledger import reduction_bytes

    samples = min(job.args.eval_samples, len(job.valid))
    batches = validation_batches(job.valid, samples, job.shape, job.trainer.engine.device)
    sums = job.trainer.loss_sums(batches, validation_batch_count(samples, job.shape))
    dist.all_reduce(sums, group=job.group)
    loss = float(sums[0] / sums[1])
    sent = reduction_bytes(sums.numel() * sums.element_size(), job.shape.data_parallel_size)
    job.log.last.update(val_loss=loss, bytes_eval=sent)
    say(f"step {job.step}: validation loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
    return loss


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def train(job: Job) -> None:
    args = job.args
    while job.step < args.train_steps:
        row = train_step(job)
        job.hook.record(loss=row["loss"], grad_norm=row["grad_norm"])
        job.log.add(row)
        last = job.step == args.train_steps
        if last or job.step % SAY_EVERY == 0 or job.step == 1:
            say(progress(job, row))
        if last:
            break
        if args.eval_interval and job.step % args.eval_interval == 0:
            evaluate(job)
        job.log.flush(job.hook.averaged_rows())
        if args.save_interval and job.step % args.save_interval == 0:
            save_checkpoint(job)


def progress(job: Job, row: Row) -> str:
    sent, ddp = job.log.total("bytes_replica"), job.log.total("bytes_ddp")
    blocked = job.hook.blocked_per_step_s
    return (
        f"step {job.step}/{job.args.train_steps} | loss {row['loss']:.4f} | "
        f"{row['tokens_per_s']:,.0f} tokens/s | next sync in {job.hook.next_sync_in} | "
        f"sent {megabytes(sent)}, DDP {megabytes(ddp)} ({times_less(sent, ddp)})"
        + ("" if blocked is None else f" | blocked {1e3 * blocked:,.1f} ms/step")
    )


def finish(job: Job) -> None:
    """Final sync, evaluation and checkpoint, and what came of the run."""
    job.hook.finish()
    if job.hook.replicas > 1:
        last = job.log.last
        last["bytes_replica"] += replica_bytes(job)
        last["seconds_blocked"] = last.get("seconds_blocked", 0.0) + replica_seconds(job)  # not in older rows
    loss = evaluate(job)
    job.log.flush(job.hook.averaged_rows())
    save_checkpoint(job)
    if dist_rank() == 0:
        summarize(job, loss)


def summarize(job: Job, val_loss: float) -> None:
    """Write summary.json and loss.png, and say what is in them."""
    first, last = job.log.rows[0], job.log.rows[-1]
    sent, ddp = job.log.total("bytes_replica"), job.log.total("bytes_ddp")
    facts = {
        "title": f"{Path(job.args.deepspeed_config).stem}, {Path(job.args.model).stem}",
        "steps": job.step,
        "tokens": last["tokens"],
        "data_parallel_size": job.shape.data_parallel_size,
        "tensor_parallel": job.args.tensor_parallel,
        "pipeline_parallel": job.args.pipeline_parallel,
        "replicas": job.hook.replicas,
        "first_loss": first["loss"],
        "last_loss": last["loss"],
        "val_loss": val_loss,
        "val_perplexity": perplexity(val_loss),
        "unigram_perplexity": job.unigram_perplexity,
        "bytes_replica": sent,
        "bytes_ddp": ddp,
        "bytes_ratio": ddp / sent if sent else None,
        "wall_s": time.perf_counter() - job.started,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
    }
    job.log.finish(facts)
    say(
        f"loss {first['loss']:.3f} -> {last['loss']:.3f} in {job.step} steps; validation perplexity "
        f"{perplexity(val_loss):.1f} (a unigram model: {job.unigram_perplexity:.1f})\n"
        f"each rank sent {megabytes(sent)}; AdamW-DDP sends {megabytes(ddp)}: {times_less(sent, ddp)}\n"
        f"in {job.args.output_dir}: metrics.jsonl, summary.json, loss.png, tensorboard/, "
        f"checkpoints/global_step{job.step}/"
    )


def main() -> None:
    with one_line_errors("pretrain_gpt.py"):
        job = set_up(parse_arguments(str(__doc__).splitlines()[0]))
    train(job)
    finish(job)
    if job.claim is not None:
        job.claim.release()
    shut_down()


if __name__ == "__main__":
    main()
