"""The whole algorithm on a list of replicas in one process: the specification of everything faster.

Written for reading, with the letters of `lordo_ds.core`; only the decomposition behind the basis is shared
with the fast path. Weights are dictionaries name -> tensor, one per replica; gradients likewise, with None
for a replica that skips the step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lordo_ds.config import LordoConfig
from lordo_ds.core.basis import refresh_basis, sketch_seed
from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.core.model_fragments import model_fragments
from lordo_ds.core.reference_streaming import Flights, adopted
from lordo_ds.core.reference_wire import ReferenceWire
from lordo_ds.core.schedule import SyncPlan, first_basis_due, sync_plan


class Reference:
    """LoRDO, arXiv 2602.04396, on M replicas held in memory; `weights` are updated in place."""

    def __init__(self, config: LordoConfig, plans: list[ParameterPlan], weights: list[dict[str, Tensor]]) -> None:
        self.config, self.plans, self.weights = config, plans, weights
        self.M, self.n = len(weights), 0
        self.own_basis = self.M == 1 or config.projection == "local"
        self.doubtful: set[int] = set()
        self.executed = [0] * self.M
        self.sizes_before: list[dict[str, float]] = [{} for _ in weights]
        self.anchor = {p.name: weights[0][p.name].clone() for p in plans}
        where = model_fragments(config, [(p.name, p.numel * p.partitions) for p in plans])
        self.fragments = [[p for p in plans if where[p.name] == f] for f in range(config.streaming.fragments)]
        self.wire = ReferenceWire(config, self.fragments, self.M, next(iter(self.anchor.values())))
        self.flights = Flights(self)
        self.momentum = {p.name: torch.zeros_like(self.anchor[p.name]) for p in plans}
        self.state: list[dict[str, dict[str, Any]]] = [{p.name: self.zeros(p) for p in plans} for _ in weights]

    def zeros(self, p: ParameterPlan) -> dict[str, Any]:
        like = self.anchor[p.name]
        shape = (p.rank, p.other_side) if p.low_rank else p.shape
        state = {"t": 0, "Q": None, "u": like.new_zeros(shape), "v": like.new_zeros(shape)}
        if p.low_rank:
            s, l = p.basis_side, p.other_side  # noqa: E741
            state |= {"E": like.new_zeros(s, l), "row": like.new_zeros(s), "col": like.new_zeros(l)}
        return state

    def step(
        self,
        gradients: list[dict[str, Tensor] | None],
        lr: float | None = None,
        losses: list[float] | None = None,
    ) -> SyncPlan:
        """One attempted step on every replica, and the sync that it ends in if one is due.

        A loss that is not finite, of a step that was executed, keeps its replica out of the next sync.

        A matrix gets its basis from the first gradient that has a direction. Until then its moments are zero, its t
        stands, and an executed step of it is weight decay alone.
        """
        self.n += 1
        lr = self.config.lr if lr is None else lr
        plan = sync_plan(self.config, self.n)
        executed = {m: G for m, G in enumerate(gradients) if G is not None}
        waiting = [p.name for p in self.plans if p.low_rank and self.state[0][p.name]["Q"] is None]
        finite = [m for m, G in executed.items() if all(bool(torch.isfinite(G[name]).all()) for name in waiting)]
        for p in self.plans:
            if p.low_rank:
                self._bases_before(p, plan, {m: G[p.name] for m, G in executed.items()}, finite)
            for m, G in executed.items():
                if p.low_rank and self.state[m][p.name]["Q"] is None:
                    self.weights[m][p.name] *= 1 - lr * self.config.weight_decay
                else:
                    self._inner(p, self.weights[m][p.name], G[p.name], self.state[m][p.name], lr)
        for m in executed:
            self.executed[m] += 1
        self.flights.land_if_due()
        if plan.due and plan.fragment is None:
            self.sync(plan, self.plans, gradients)
        elif plan.due:
            self.flights.begin(plan, gradients)
        self.doubtful |= {m for m in executed if losses and not math.isfinite(losses[m])}
        return plan

    def _bases_before(self, p: ParameterPlan, plan: SyncPlan, gradients: dict[int, Tensor], finite: list[int]) -> None:
        """First bases, and those that a replica refreshes inside a due step from its own A = G + E.

        Where the gradient, averaged over the replicas that have only finite ones, is zero there is none yet.
        """
        due = first_basis_due(self.config, self.n)
        refresh = self.config.basis_source == "gradient" and self.own_basis and plan.refresh_basis
        may_be_first = due or not any(self.executed)
        if not self.own_basis and self.state[0][p.name]["Q"] is None and finite and may_be_first:
            mean = torch.stack([p.orient(gradients[m]) for m in finite]).mean(0)
            for m in range(self.M):
                self._refresh(p, self.state[m][p.name], mean)
        for m, G in gradients.items():
            S = self.state[m][p.name]
            may_be_first = due or not self.executed[m]
            if self.own_basis and (refresh or (S["Q"] is None and may_be_first)):
                self._refresh(p, S, p.orient(G) + (S["E"] if self.config.error_feedback else 0))

    def _refresh(self, p: ParameterPlan, S: dict[str, Any], D: Tensor) -> None:
        """Q' from D, and the moments in it: u <- R u; v <- c2 |R^2 (v^ - u^^2) + (R u^)^2|, R = Q'^T Q.

        A D without a direction (zero, not finite) leaves the basis as it is, also where there is none.
        """
        old = S["Q"]
        S["Q"] = refresh_basis(
            D,
            old,
            p.rank,
            method=self.config.basis_update,
            source=self.config.basis_source,
            seed=sketch_seed(p.basis_side, self.n),
        ).basis
        if old is not None and S["t"] > 0:
            R = S["Q"].T @ old
            c1, c2 = (1 - b ** S["t"] for b in self.config.betas)
            u, v = S["u"] / c1, S["v"] / c2
            S["u"], S["v"] = R @ S["u"], c2 * ((R**2) @ (v - u**2) + (R @ u) ** 2).abs()

    def _inner(self, p: ParameterPlan, weight: Tensor, gradient: Tensor, S: dict[str, Any], lr: float) -> None:
        (b1, b2), omega, mode = self.config.betas, self.config.omega, self.config.qh_mode
        S["t"] += 1
        c1, c2 = 1 - b1 ** S["t"], 1 - b2 ** S["t"]
        weight *= 1 - lr * self.config.weight_decay
        W, G = (p.orient(weight), p.orient(gradient)) if p.low_rank else (weight, gradient)
        Q = S["Q"] if p.low_rank else None
        A = G + S["E"] if Q is not None and self.config.error_feedback else G
        S["A"] = A
        g = A if Q is None else Q.T @ A
        if Q is not None and self.config.error_feedback:
            S["E"] = A - Q @ g
        S["u"] = b1 * S["u"] + (1 - b1) * g
        S["v"] = b2 * S["v"] + (1 - b2) * g**2
        den = torch.sqrt(S["v"] / c2) + self.config.eps
        N = (S["u"] / c1) / den
        if Q is None:
            W -= lr * N
        elif mode == "none":
            W -= lr * (Q @ N)
        elif mode == "full_rank":
            W -= lr * ((1 - omega) * G / den.mean(0, keepdim=True) + omega * (Q @ N))
        else:
            W -= lr * (Q @ (((1 - omega) * (Q.T @ G) + omega * S["u"] / c1) / den))
        if Q is not None and mode == "factored":
            S["row"] = b2 * S["row"] + (1 - b2) * (G**2).mean(1)
            S["col"] = b2 * S["col"] + (1 - b2) * (G**2).mean(0)
            rh, ch = S["row"] / c2, S["col"] / c2
            if rh.mean() > 0:
                P = G - Q @ (Q.T @ G)
                scale = torch.sqrt(torch.outer(rh, ch) / rh.mean()) + self.config.eps
                W -= lr * self.config.weight_of_residual * P / scale

    def sync(self, plan: SyncPlan, plans: list[ParameterPlan], gradients: list[dict[str, Tensor] | None]) -> list[int]:
        """Fixed order: D from the raw weights; weights and anchor; moments; Q' from the raw D; moments in Q'.

        Returns:
            The replicas that took part.
        """
        # One replica with plain averaging keeps no anchor to return to.
        alone = self.M == 1 and self.config.outer.is_plain_average
        finite = [m for m in range(self.M) if alone or (self._is_finite(m) and m not in self.doubtful)]
        self.doubtful.clear()
        if self.M > 1 and self.config.max_outlier != "never":
            finite = self._near_each_other(finite, self.config.max_outlier)
        self.executed = [max(self.executed)] * self.M
        if len(finite) < self.config.least_participants(self.M):
            finite = []
        own = {m: {p.name: self.anchor[p.name] - self.weights[m][p.name] for p in plans} for m in finite}
        updates = means = self.wire.means(plan.fragment, own) if finite else {}
        if not self.wire.at_owners:
            updates = means = self.wire.told(plan.fragment, means)
        if finite:
            donor = self.state[finite[0]]
            updates = {p.name: self._outer(p, plan, means[p.name], donor[p.name]["Q"]) for p in plans}
        if self.wire.at_owners:
            updates = self.wire.told(plan.fragment, updates)
        for p in plans:
            if not finite:  # too few to learn from: back to the anchor, with fresh moments in the old basis
                for m in range(self.M):
                    self.weights[m][p.name].copy_(self.anchor[p.name])
                    self.state[m][p.name] |= {k: v for k, v in self.zeros(p).items() if k != "Q"}
                continue
            D = means[p.name]
            self.anchor[p.name] = self.anchor[p.name] - updates[p.name]
            for m in range(self.M):
                self.weights[m][p.name].copy_(self.anchor[p.name])
            self._common_steps(p, finite)
            self._average_moments(p, plan, finite)
            if p.low_rank and plan.refresh_basis and not (self.config.basis_source == "gradient" and self.own_basis):
                shared = None if self.own_basis and self.M > 1 else D
                if self.config.basis_source == "gradient":
                    took_part = [m for m, G in enumerate(gradients) if G is not None and m in finite]
                    parts = [self.state[m][p.name]["A"] for m in took_part if "A" in self.state[m][p.name]]
                    shared = p.orient(torch.zeros_like(D)) if not parts else torch.stack(parts).mean(0)
                elif shared is not None:
                    shared = p.orient(shared)
                for m in finite:
                    if self.state[m][p.name]["Q"] is not None:
                        D_m = p.orient(own[m][p.name]) if shared is None else shared
                        self._refresh(p, self.state[m][p.name], D_m)
            for m in set(range(self.M)) - set(finite):  # a left-out replica adopts the first finite one's state
                self.state[m][p.name] = adopted(self.state[finite[0]][p.name])
        if plan.fragment is None:
            self.wire.forget([m for m in range(self.M) if m not in finite])
        return finite

    def _outer(self, p: ParameterPlan, plan: SyncPlan, D: Tensor, Q: Tensor | None) -> Tensor:
        outer, mu = self.config.outer, self.config.outer.momentum
        if plan.plain_average:
            return D
        if Q is not None:
            inside = Q @ Q.T @ p.orient(D)
            D = p.orient(inside + outer.residual_gain * (p.orient(D) - inside))
        m = self.momentum[p.name] = mu * self.momentum[p.name] + D
        step = outer.lr * (D + mu * m if outer.nesterov else m)
        return p.orient(self._orthogonalized(p.orient(step))) if p.low_rank and outer.orthogonalize else step

    @staticmethod
    def _orthogonalized(D: Tensor) -> Tensor:
        """Five iterations of X <- a X + b (X X^T) X + c (X X^T)^2 X, from D / |D|_F; then the norm of D again."""
        if D.norm() == 0:
            return D
        X = D / D.norm()
        for _ in range(5):
            A: Tensor = X @ X.T
            X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
        scaled: Tensor = X * D.norm() / X.norm()
        return scaled

    def _is_finite(self, m: int) -> bool:
        tensors = list(self.weights[m].values())
        for S in self.state[m].values():
            tensors += [S[key] for key in ("u", "v", "row", "col", "E") if key in S]
        return all(bool(torch.isfinite(t).all()) for t in tensors)

    def _near_each_other(self, finite: list[int], limit: float) -> list[int]:
        """Those of which no size is more than `limit` times the others' median.

        The others are those that executed at least as many steps; with one of them, its size or what the replica had
        itself at its last sync, whichever is larger, is the measure.
        """
        sizes = {m: self._sizes(m) for m in finite}
        near = []
        for m in finite:
            others = [j for j in finite if j != m and self.executed[j] >= self.executed[m]]
            fits = True
            for key, size in sizes[m].items():
                measures = [sizes[j][key] for j in others if sizes[j][key] > 0]
                if len(measures) == 1:
                    measures.append(self.sizes_before[m].get(key, 0.0))
                fits &= not measures or size <= limit * sorted(measures)[len(measures) // 2]
            near += [m] * fits
        for m in near:
            self.sizes_before[m] |= {key: size for key, size in sizes[m].items() if size > 0}
        return near

    def _sizes(self, m: int) -> dict[str, float]:
        """|D_m|, and the largest absolute value of D_m, the weights and each kind of state, of squares the root."""
        D = torch.cat([(self.anchor[p.name] - self.weights[m][p.name]).flatten() for p in self.plans])
        held: dict[str, list[Tensor]] = {"W": list(self.weights[m].values())}
        for S in self.state[m].values():
            for key in ("u", "v", "row", "col", "E"):
                held.setdefault(key, []).append(S.get(key, torch.zeros(1)))
        peaks = {key: max(float(t.abs().max()) for t in tensors) for key, tensors in held.items()}
        roots = {key: peak**0.5 if key in ("v", "row", "col") else peak for key, peak in peaks.items()}
        return {"D": float(D.norm()), "largest D": float(D.abs().max()), **roots}

    def _common_steps(self, p: ParameterPlan, finite: list[int]) -> None:
        """Every replica takes the largest t; its moments keep their bias-corrected values."""
        common = max(self.state[m][p.name]["t"] for m in finite)
        for m in finite:
            S = self.state[m][p.name]
            S["fresh"] = S["t"] == 0 and common > 0  # never stepped: nothing to contribute to an average
            if 0 < S["t"] < common:
                for keys, b in ((("u",), self.config.betas[0]), (("v", "row", "col"), self.config.betas[1])):
                    for key in keys:
                        if key in S:
                            S[key] = S[key] * (1 - b**common) / (1 - b ** S["t"])
            S["t"] = common

    def _average_moments(self, p: ParameterPlan, plan: SyncPlan, finite: list[int]) -> None:
        wanted = [("u", plan.average_exp_avg), ("v", plan.average_exp_avg_sq)]
        wanted += [("row", plan.average_exp_avg_sq), ("col", plan.average_exp_avg_sq)] if p.low_rank else []
        states = [self.state[m][p.name] for m in finite]
        givers = [S for S in states if not S["fresh"]]
        for key, due in wanted:
            if due and (p.low_rank or self.config.average_dense_moments):
                mean = torch.stack([S[key] for S in givers]).mean(0)
                for S in states:
                    S[key] = mean.clone()
