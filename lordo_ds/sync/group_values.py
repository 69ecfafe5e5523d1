"""Learning rates, betas, eps and weight decay of the parameter groups, compared across replicas at every sync.

Schedules and users change them in `param_groups` as training goes. Replicas at the same executed step must have the
same; one that skipped steps lags behind by right, with any of the values (Megatron schedules weight decay, DeepSpeed's
OneCycle the betas), until it takes over the schedule of the others.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Sequence

import torch

from lordo_ds.comm.inside import InsideReplica
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.errors import SyncError
from lordo_ds.replica.fragment import Fragment
from lordo_ds.sync.header import Header, bits_of

logger = logging.getLogger("lordo_ds")

_KEYS = ("lr", "beta1", "beta2", "eps", "weight_decay")


class GroupValues:
    """The parameter groups of one rank's parameters, in their order."""

    def __init__(self, items: Sequence[Fragment]) -> None:
        self._told_values: list[float] = []
        self._groups = list({id(item.group): (item.plan.name, item.group) for item in reversed(items)}.values())[::-1]
        self._skips_seen = False
        self._told = False

    def _values(self) -> list[float]:
        """Of all groups, one after the other; a value that is a tensor is read, which may wait for the device."""
        found: list[float] = []
        for _, group in self._groups:
            found += [float(group["lr"]), *map(float, group["betas"]), float(group["eps"])]
            found.append(float(group["weight_decay"]))
        return found

    def digest(self) -> int:
        """Of the values now, which a comparison then is of."""
        values = self._told_values = self._values()
        return zlib.crc32(struct.pack(f"{len(values)}d", *values))

    def compare(
        self, wire: ReplicaWire, inside: InsideReplica, headers: Sequence[Header], finite: Sequence[bool], step: int
    ) -> None:
        """Refuse to average replicas with other values at the same executed step. Collective where digests differ.

        Raises:
            SyncError: on all ranks at once: the key, the values and the replicas.
        """
        made = [(header.executed_steps, header.executed_now) for header in headers]
        self._skips_seen |= any(executed != step for executed, _ in made)
        alike: dict[tuple[int, bool], set[int]] = {}
        for header, steps, ok in zip(headers, made, finite, strict=True):
            if ok:
                alike.setdefault(steps, set()).add(header.groups)
        if all(len(digests) == 1 for digests in alike.values()):
            return
        compared = [steps if ok else None for steps, ok in zip(made, finite, strict=True)]
        words = self._difference(wire, inside, compared)
        # Replicas that skipped steps, or came later, may have a schedule that nobody moved on: no reason to end.
        if self._skips_seen or not wire.steps_alike:
            if not self._told:
                logger.warning("LoRDO: %s at step %d: give all replicas the same schedule", words, step)
            self._told = True
            return
        raise SyncError(
            f"LoRDO: {words} at step {step}, although all made the same steps: change param_groups on all replicas "
            "alike"
        )

    def _difference(self, wire: ReplicaWire, inside: InsideReplica, compared: Sequence[tuple[int, bool] | None]) -> str:
        """The first difference in words, the same on all ranks of all replicas; this rank may have none."""
        told = wire.gather(inside.vector(bits_of(self._told_values)), "header")
        table = told.cpu().contiguous().view(torch.float64)
        found: list[str] = []
        for column in range(table.shape[1]):
            for made in dict.fromkeys(filter(None, compared)):
                replicas = [m for m, other in enumerate(compared) if other == made]
                by_value: dict[float, list[int]] = {}
                for m in replicas:
                    by_value.setdefault(float(table[m, column]), []).append(m)
                if len(by_value) > 1 and not found:
                    name, _ = self._groups[column // len(_KEYS)]
                    values_of = ", ".join(f"{value:g} on replicas {where}" for value, where in by_value.items())
                    found.append(f"{_KEYS[column % len(_KEYS)]} of the parameter group of {name} is {values_of}")
        everywhere = inside.of_every_rank(found)
        return everywhere[0] if everywhere else "the parameter groups differ"
