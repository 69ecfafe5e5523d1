"""`pretrain_gpt.py` with faults put in on purpose; `soak_test.py` starts it.

LORDO_FAULTS is a JSON object: for each kind of fault a list of [step, rank].

    nan        one weight of the rank becomes NaN after the step
    overflow   one gradient becomes infinite in the step
    slow       the rank takes SLOW_S longer
    crash      the rank is killed before the step, the first time only

Every rank notes its resident memory in LORDO_MEMORY.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pretrain_gpt as script

from pretrain.launch import dist_rank

SLOW_S = 1.5
NOTE_EVERY = 20  # steps


def main() -> None:
    faults = {kind: {tuple(one) for one in where} for kind, where in json.loads(os.environ["LORDO_FAULTS"]).items()}
    notes = Path(os.environ["LORDO_MEMORY"])
    faultless = script.train_step

    def train_step(job: script.Job) -> script.Row:
        now = job.step + 1, dist_rank()
        if now in faults["crash"] and not (marker := notes / f"crashed_{now[0]}").exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if now in faults["slow"]:
            time.sleep(SLOW_S)
        handle = overflow(job.trainer.engine) if now in faults["overflow"] else None
        row = faultless(job)
        if handle is not None:
            handle.remove()
        if now in faults["nan"]:
            job.hook.optimizer.sync.items[0].weight.view(-1)[0] = math.nan
        if job.step % NOTE_EVERY == 0:
            with (notes / f"rank{dist_rank()}.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"pid": os.getpid(), "step": job.step, "rss_mib": resident_mib()}) + "\n")
        return row

    script.train_step = train_step
    script.main()


def overflow(engine: Any) -> Any:
    """Have the next backward give an infinite gradient."""
    parameter = next(p for p in engine.module.parameters() if p.requires_grad)
    return parameter.register_hook(lambda gradient: gradient * math.inf)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


if __name__ == "__main__":
    main()
