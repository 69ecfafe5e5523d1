"""CPU seconds that a sync costs each replica, with the work on every replica and at its owners, by wire format.

    python launchers/bench_sync.py                     # writes docs/results/bench_sync.md

All replicas are threads of one process, on one core each, and meet in memory: what is timed is a replica's own work
(outer step, orthogonalizing, refresh of the bases, encoding and decoding), by its thread's CPU clock, which waiting for
others and for a core does not advance. The two ways are run in turn, and the medians of all syncs compared.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lab.replicas import Replicas
from lordo_ds.core.codec import Codec
from lordo_ds.core.grouping import ParameterFacts
from lordo_ds.core.state import MOMENTA
from lordo_ds.replica.bases import Bases
from lordo_ds.sync import outer_step

RESULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "bench_sync.md"
SHAPES = [(256, 256)] * 8 + [(256, 1024)] * 4 + [(1024, 256)] * 4 + [(2048, 256)]  # the last one is not projected
WIRES: dict[str, Any] = {
    "fp32": "fp32",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int4",
    "64 of 4096": {"top_k": 64, "block": 4096},
}


class Work:
    """Time that each thread has spent in what owners divide: orthogonalizing, refreshing bases, encoding, decoding."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        outer_step.orthogonalized = self._timed(outer_step.orthogonalized)  # type: ignore[assignment]
        Bases.refresh = self._timed(Bases.refresh)  # type: ignore[method-assign]
        Codec.encode_ = self._timed(Codec.encode_)  # type: ignore[method-assign]
        Codec.decode = self._timed(Codec.decode)  # type: ignore[method-assign]

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            began = time.thread_time()
            result = function(*given, **named)
            self._of_thread.seconds = getattr(self._of_thread, "seconds", 0.0) + time.thread_time() - began
            return result

        return run

    def take(self) -> float:
        found, self._of_thread.seconds = getattr(self._of_thread, "seconds", 0.0), 0.0
        return float(found)


def seconds(work: Work, compute: str, wire: Any, replicas: int, syncs: int) -> tuple[list[tuple[float, float]], int]:
    """CPU seconds of each sync, and of the work in it, mean over the replicas; bytes of outer momentum in all."""
    torch.manual_seed(0)
    start = [torch.randn(shape) / shape[1] ** 0.5 for shape in SHAPES]
    named = [[(f"{i}.weight", torch.nn.Parameter(w.clone())) for i, w in enumerate(start)] for _ in range(replicas)]
    facts = {
        f"{i}.weight": ParameterFacts(f"{i}.weight", shape, embedding=i == len(SHAPES) - 1)
        for i, shape in enumerate(SHAPES)
    }
    settings = {"preset": "recommended", "rank": "1/8", "sync_interval": 1, "pseudo_gradient_dtype": wire}
    together = Replicas(named, facts, {**settings, "outer": {"compute": compute}})
    found = []

    def end_attempt(m: int) -> tuple[float, float]:
        torch.set_num_threads(1)
        work.take()
        began = time.thread_time()
        together.optimizers[m].end_attempt()
        return time.thread_time() - began, work.take()

    for _ in range(syncs + 1):
        for parameters, optimizer in zip(named, together.optimizers, strict=True):
            for _, parameter in parameters:
                parameter.grad = torch.randn_like(parameter) / 10
            optimizer.step()
        all_, of_work = zip(*together._together(end_attempt), strict=True)
        found.append((sum(all_) / replicas, sum(of_work) / replicas))
    states = [item.state for one in together.optimizers if one.sync is not None for item in one.sync.items]
    momentum = sum(state[name].numel() * 4 for state in states for name in MOMENTA if name in state)
    together.close()
    return found[1:], momentum  # the first one makes bases too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--syncs", type=int, default=5, help="of each way in each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    work = Work()
    lines = [
        "| wire | the work, on every replica and at the owners, ms | ratio | the whole sync, ms | ratio "
        "| outer momentum of all replicas, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, wire in WIRES.items():
        times: dict[str, list[tuple[float, float]]] = {"everyone": [], "owner": []}
        momenta = {}
        for _ in range(given.turns):
            for compute, of_way in times.items():
                more, momenta[compute] = seconds(work, compute, wire, given.replicas, given.syncs)
                of_way += more
        medians = {way: [1e3 * statistics.median(one) for one in zip(*times[way], strict=True)] for way in times}
        (whole, part), (whole_owner, part_owner) = medians["everyone"], medians["owner"]
        lines.append(
            f"| {name} | {part:.1f}, {part_owner:.1f} | {part_owner / part:.2f} | {whole:.1f}, {whole_owner:.1f} | "
            f"{whole_owner / whole:.2f} | {momenta['everyone'] / 2**20:.1f}, {momenta['owner'] / 2**20:.1f} |"
        )
        print(lines[-1], flush=True)
    elements = sum(rows * columns for rows, columns in SHAPES)
    given.out.write_text(
        "# What a sync costs each replica\n\n"
        f"CPU time of a replica's thread in one sync (median), {given.replicas} replicas, preset `recommended` at rank "
        f"1/8, {elements:,} elements in {len(SHAPES) - 1} projected matrices and a dense one, fp32. The work is what "
        "the owners divide (but for decoding): orthogonalizing, refreshing the bases, encoding and decoding. The whole "
        "sync has besides it D, checksums, finite checks and the headers.\n\n"
        + "\n".join(lines)
        + f"\n\nCommand: `python launchers/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`; {platform.processor()} "
        f"{platform.machine()}, torch {torch.__version__}, one core to a replica.\n"
    )
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
