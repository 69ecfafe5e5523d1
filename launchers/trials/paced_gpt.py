"""`pretrain_gpt.py` in segments, without its evaluation and checkpoint at the end; `bench_network.py` starts it."""

from __future__ import annotations

import os
from pathlib import Path

import pretrain_gpt as script

from pretrain.launch import dist_rank
from trials.pacer import PACE, Pacer


def main() -> None:
    pacer = Pacer(Path(os.environ[PACE]), dist_rank())
    plain_step = script.train_step

    def train_step(job: script.Job) -> script.Row:
        pacer.pause_after(job.step)
        row = plain_step(job)
        sent, blocked = row["bytes_replica"], row.get("seconds_blocked")
        pacer.note_step(row["step"], row["tokens"], ledger_bytes=sent, blocked_s=blocked)
        return row

    def finish(job: script.Job) -> None:
        pacer.pause_after(job.step)
        job.hook.finish()

    script.train_step, script.finish = train_step, finish
    script.main()


if __name__ == "__main__":
    main()
