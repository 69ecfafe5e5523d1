"""One run from its spec to its row: all replicas of a small GPT in this process."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lab.data import Text, context_free_losses, open_text
from lab.measures import spectra
from lab.model import SIZES, ReplicatedGpt, shapes
from lab.questions import evaluate_tasks
from lab.replicas import Replicas
from lab.spec import RunSpec
from lordo_ds.comm.ledger import reduction_bytes
from lordo_ds.config import OuterOptimizer
from lordo_ds.core.grouping import ParameterFacts, plan_parameters
from lordo_ds.core.outer import orthogonalized, outer_update, pseudo_gradient
from lordo_ds.core.schedule import sync_plan
from lordo_ds.core.state import PLACED
from lordo_ds.errors import SyncError
from lordo_ds.replica.fragment import Fragment
from lordo_ds.start_table import state_bytes

POINTS = 8  # validations on the way


@dataclass
class Diary:
    """What happened on the way."""

    train: list[float] = field(default_factory=list)
    syncs: list[tuple[int, float, float, float]] = field(default_factory=list)
    points: list[dict[str, float]] = field(default_factory=list)


class SlowOuter:
    """An outer optimizer around one replica that steps by itself; see `RunSpec.slow`."""

    def __init__(self, spec: RunSpec, facts: Iterable[ParameterFacts], weights: dict[str, Tensor]) -> None:
        slow = spec.slow or {}
        self.interval, self.after = int(slow.get("interval", 0)), spec.config.sync_warmup_steps
        self.outer = OuterOptimizer(**{key: value for key, value in slow.items() if key != "interval"})
        self.matrices = {plan.name: plan for plan in plan_parameters(spec.config, facts) if plan.low_rank}
        self.weights = weights if self.interval else {}
        self.anchor = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.momentum = {name: torch.zeros_like(anchor) for name, anchor in self.anchor.items()}

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        """W = anchor - outer(anchor - W) when due; through the warm-up the anchor follows the weights."""
        if not self.interval or (step > self.after and step % self.interval):
            return
        for name, weight in self.weights.items():
            if step > self.after:
                update = outer_update(pseudo_gradient(self.anchor[name], weight), self.momentum[name], self.outer)
                if self.outer.orthogonalize and name in self.matrices:
                    orient = self.matrices[name].orient
                    update = orient(orthogonalized(orient(update[0]))).unsqueeze(0)
                weight.copy_(self.anchor[name] - update)
            self.anchor[name].copy_(weight)

    @property
    def state_bytes(self) -> int:
        return sum(2 * anchor.numel() * anchor.element_size() for anchor in self.anchor.values())


class Run:
    """A run under way."""

    def __init__(self, spec: RunSpec, device: torch.device) -> None:
        self.spec, self.device, self.size = spec, device, SIZES[spec.model]
        self.text: Text = open_text(self.size.vocab)
        self.model = ReplicatedGpt(self.size, 1 if spec.one_replica else spec.replicas, spec.seed, device)
        facts = {
            name: ParameterFacts(name, shape, embedding=name == "embedding.weight", tied_to_embedding=False)
            for name, shape in shapes(self.size).items()
        }
        named = [self.model.replica(m) for m in range(self.model.replicas)]
        self.by_name = [dict(parameters) for parameters in named]
        self.replicas = Replicas(named, facts, {**spec.settings, "lr": spec.lr})
        self.slow = SlowOuter(spec, facts.values(), self.model.weights)
        self.start = {name: weight[0].detach().clone() for name, weight in self.model.weights.items()}
        self.windows = self.text.validation(spec.validation, self.size.seq_length).to(device)
        self.diary = Diary()

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to a tenth; step counts from 1."""
        if step <= self.spec.lr_warmup:
            return self.spec.lr * step / self.spec.lr_warmup
        done = (step - self.spec.lr_warmup) / (self.spec.steps - self.spec.lr_warmup)
        return self.spec.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def train(self) -> bool:
        """All steps and the final sync; False where the loss stopped being a number for good."""
        lost = 0
        for step in range(1, self.spec.steps + 1):
            loss = self._gradients(step)
            self.diary.train.append(loss)
            lost = 0 if math.isfinite(loss) else lost + 1
            if lost > 3 * max(8, self.spec.config.sync_interval):
                return False
            try:
                self.replicas.step(self.lr_at(step))
            except SyncError:
                return False
            self.slow.end_step(step)
            self._note(step)
        self.replicas.finish()
        return True

    def _gradients(self, step: int) -> float:
        """Every replica's own gradient, clipped by its own norm; the mean loss over replicas."""
        tokens = self.text.batch(
            self.spec.seed, step, self.model.replicas, self.spec.sequences, self.size.seq_length
        ).to(self.device)
        stacks = list(self.model.weights.values())
        losses = self.model.losses(tokens)
        gradients = torch.autograd.grad(losses.sum(), stacks)
        if self.spec.clip:
            squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
            scale = (self.spec.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
            gradients = tuple(g.mul_(scale.view(-1, *[1] * (g.dim() - 1))) for g in gradients)
        for name, gradient in zip(self.model.weights, gradients, strict=True):
            for m, parameters in enumerate(self.by_name):
                parameters[name].grad = gradient[m]
        return float(losses.mean().detach())

    def _note(self, step: int) -> None:
        """Sync reports, and now and then a small validation; both only where all replicas are equal."""
        if not self.replicas.first.synced:
            return
        report, config = self.replicas.first.last_report, self.spec.config
        if sync_plan(config, step).refresh_basis and report is not None and report.captured_gradient_energy is not None:
            overlap = math.nan if report.overlap is None else report.overlap
            self.diary.syncs.append((step, overlap, report.captured_gradient_energy, report.drift))
        if step >= self.spec.steps * (len(self.diary.points) + 1) / POINTS and step < self.spec.steps:
            self._note_loss(step, self._validate(self.windows[:: max(1, self.spec.validation // 128)]))

    def _note_loss(self, step: int, loss: float) -> None:
        rank = self._spectra()["change_effective_rank"] if math.isfinite(loss) else 0.0
        self.diary.points.append({"step": step, "val_loss": loss, "rank": rank})

    def _validate(self, windows: Tensor) -> float:
        return self.model.evaluate(0, windows, 64)

    def _spectra(self) -> dict[str, float]:
        weights, plans = self.model.weights, [item.plan for item in self._items]
        # Matrices that a baseline does not project are measured at the rank it would have.
        rank = self.spec.config.rank_for(self.size.hidden)
        return spectra(
            (p.name, weights[p.name][0].detach(), self.start[p.name], p.rank or rank)
            for p in plans
            if len(p.shape) == 2 and not p.name.startswith("embedding")
        )

    @property
    def _items(self) -> list[Fragment]:
        return self.replicas.syncs[0].items

    def tasks(self, items: int) -> dict[str, float]:
        """Accuracies in held-out tasks; see `lab.questions`."""

        def logits(tokens: Tensor) -> Tensor:
            return self.model.logits(0, tokens.to(self.device)).cpu()

        return evaluate_tasks(self.text, self.size.seq_length, self.size.vocab, logits, items)

    def bytes_sent(self) -> tuple[int, int]:
        """Bytes that the rank that sends most sent in the run, and those of all-reducing whole gradients at every step.

        One replica of several ranks is charged what a dedicated implementation would send at least: coordinates of
        projected gradients, whole ones of the others, and its bases for nothing.
        """
        spec = self.spec
        everything = sum(4 * item.numel for item in self._items)
        ddp = reduction_bytes(everything, spec.replicas) * spec.steps
        if not spec.one_replica:
            return max(sync.wire.ledger.total_bytes for sync in self.replicas.syncs), ddp
        stays_inside = spec.config.qh_mode in ("none", "low_rank")
        payload = sum(
            4 * (i.plan.rank * i.plan.other_side if i.plan.low_rank and stays_inside else i.numel) for i in self._items
        )
        return reduction_bytes(payload, spec.replicas) * spec.steps, ddp

    def row(self, finished: bool, wall_s: float) -> dict[str, Any]:
        """The run's line in results.csv, without where and from which commit it ran."""
        spec, config = self.spec, self.spec.config
        loss = self._validate(self.windows) if finished else math.inf
        self._note_loss(len(self.diary.train), loss)
        unigram, bigram = context_free_losses(self.text, self.windows.cpu(), self.size.vocab)
        sent, ddp = self.bytes_sent()
        # Of the replica that keeps most: owners keep what they own.
        state = max((state_bytes(sync.items) for sync in self.replicas.syncs), key=lambda kinds: sum(kinds.values()))
        host = sum(state.get(kind, 0) for kind in PLACED) + self.slow.state_bytes
        late = self.diary.syncs[len(self.diary.syncs) // 2 :]
        tail = self.diary.train[-max(1, spec.steps // 20) :]
        return {
            "val_loss": loss,
            "diverged": int(not loss < unigram),
            "train_loss": sum(tail) / len(tail),
            "bytes": sent,
            "bytes_ddp": ddp,
            "state_bytes": sum(state.values()) + self.slow.state_bytes,
            "host_state_bytes": host,
            "tokens": spec.sequences * self.size.seq_length * len(self.diary.train),
            "unigram_loss": unigram,
            "bigram_loss": bigram,
            "overlap": _mean([overlap for _, overlap, _, _ in late if not math.isnan(overlap)]),
            "captured_energy": _mean([captured for _, _, captured, _ in late]),
            "drift": _mean([drift for _, _, _, drift in late]),
            **(self._spectra() if finished and math.isfinite(loss) else {}),
            "rank": max((item.plan.rank for item in self._items), default=0) or math.nan,
            "K": 1 if spec.one_replica else config.sync_interval,
            "M": spec.replicas,
            "B": spec.sequences // spec.replicas,
            "curve": json.dumps(self._curve()),
            "wall_s": round(wall_s, 2),
        }

    def _curve(self) -> dict[str, list[list[float]]]:
        """Training losses (means over sixteenths), validations and sync reports, thinned for the CSV."""
        train, width = self.diary.train, max(1, len(self.diary.train) // 16)
        means = [[i + width, _round(_mean(train[i : i + width]))] for i in range(0, len(train) - width + 1, width)]
        stride = max(1, len(self.diary.syncs) // 16)
        return {
            "train": means,
            "validation": [[p["step"], _round(p["val_loss"]), _round(p["rank"])] for p in self.diary.points],
            "syncs": [[s, _round(o), _round(c), _round(d)] for s, o, c, d in self.diary.syncs[::stride]],
        }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def execute(spec: RunSpec, device: str = "cpu", tasks: int = 0) -> dict[str, Any]:
    """Train, validate, and return the row. Equal specs give equal rows on equal hardware, `wall_s` aside.

    Args:
        tasks: held-out items of each task to answer at the end; their accuracies come under "tasks".
    """
    torch.set_num_threads(1)
    if device.startswith("cuda"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic matrix products ask for
        torch.use_deterministic_algorithms(True, warn_only=True)
    began = time.perf_counter()
    run = Run(spec, torch.device(device))
    try:
        finished = run.train()
        row = run.row(finished, time.perf_counter() - began)
        return {**row, "tasks": run.tasks(tasks)} if tasks else row
    finally:
        run.replicas.close()
