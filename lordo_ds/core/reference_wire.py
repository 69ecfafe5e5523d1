"""The part of `reference.py` that says what crosses replicas where the wire rounds, and where the owners compute."""

from __future__ import annotations

import torch
from torch import Tensor

from lordo_ds.config import LordoConfig
from lordo_ds.core.codec import codec_of
from lordo_ds.core.grouping import ParameterPlan
from lordo_ds.core.ownership import Segment, at_owners, owned_segments


class ReferenceWire:
    """Every replica tells every owner, and every owner tells all; the codec leaves in the values what it does not say.

    Args:
        fragments: the parameters, by fragment of the model: each is shared out among the owners by itself.
    """

    def __init__(self, config: LordoConfig, fragments: list[list[ParameterPlan]], replicas: int, like: Tensor) -> None:
        self.fragments, self.M, self._like = fragments, replicas, like
        self.codec = codec_of(config.pseudo_gradient_dtype)
        self.at_owners = at_owners(config, replicas)
        self.rounds = self.codec.lossy and replicas > 1
        # What a replica has not said, and what an owner has not told: by parameter, of all its elements.
        self.unsent, self.untold = self._nothing(), self._nothing()

    def _nothing(self) -> list[dict[str, Tensor]]:
        return [{p.name: self._like.new_zeros(p.shape) for f in self.fragments for p in f} for _ in range(self.M)]

    def forget(self, replicas: list[int]) -> None:
        for m in replicas:
            for kept in (*self.unsent[m].values(), *self.untold[m].values()):
                kept.zero_()

    def means(self, fragment: int | None, own: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The mean of every D over the replicas `own` is of, as far as they say it to the owners."""
        found = {}
        for plans in self._chosen(fragment):
            for p in plans:
                found[p.name] = torch.stack([Ds[p.name] for Ds in own.values()]).mean(0)
            if self.rounds:
                total = {p.name: self._like.new_zeros(p.shape) for p in plans}
                for segments in self._owned(plans):
                    for m, Ds in own.items():
                        for s, values in self._said(plans, Ds, self.unsent[m], segments):
                            total[plans[s.item].name].view(-1)[s.start : s.stop] += values
                found |= {name: part / len(own) for name, part in total.items()}
        return found

    def told(self, fragment: int | None, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the owners tell of these: all replicas go on from that."""
        if not self.rounds or not values:
            return values
        found = {name: self._like.new_zeros(value.shape) for name, value in values.items()}
        for plans in self._chosen(fragment):
            for owner, segments in enumerate(self._owned(plans)):
                for s, part in self._said(plans, values, self.untold[owner], segments):
                    found[plans[s.item].name].view(-1)[s.start : s.stop] = part
        return found

    def _said(
        self, plans: list[ParameterPlan], values: dict[str, Tensor], kept: dict[str, Tensor], segments: list[Segment]
    ) -> list[tuple[Segment, Tensor]]:
        """What one message says of these segments, and of what was kept back; what it does not say is kept back."""
        names, lengths = [plans[s.item].name for s in segments], [s.numel for s in segments]
        pairs = zip(names, segments, strict=True)
        parts = [(values[name] + kept[name]).reshape(-1)[s.start : s.stop] for name, s in pairs]
        message = torch.cat([self._like.new_empty(0), *parts])
        decoded = self.codec.decode(self.codec.encode_(message), sum(lengths), like=message)
        for name, s, error in zip(names, segments, message.split(lengths), strict=True):
            kept[name].view(-1)[s.start : s.stop] = error
        return list(zip(segments, decoded.split(lengths), strict=True))

    def _owned(self, plans: list[ParameterPlan]) -> list[list[Segment]]:
        whole = [p.low_rank and self.at_owners for p in plans]
        return owned_segments([[p.numel] for p in plans], whole, self.M, self.codec.block)

    def _chosen(self, fragment: int | None) -> list[list[ParameterPlan]]:
        return self.fragments if fragment is None else [self.fragments[fragment]]
