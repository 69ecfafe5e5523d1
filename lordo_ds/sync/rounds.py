"""One sync: what is due and who takes part, and what its parts add up for the report."""

from __future__ import annotations

from dataclasses import dataclass

from lordo_ds.core.schedule import SyncPlan


@dataclass(frozen=True)
class Round:
    """One sync: what is due, and which replicas its averages are over.

    `gives_gradient` are those of the participants that executed the step that has just ended.
    """

    plan: SyncPlan
    step: int
    participants: list[int]
    gives_gradient: list[int]
    replica: int

    @property
    def takes_part(self) -> bool:
        return self.replica in self.participants


@dataclass
class Shares:
    """This rank's share of what the report adds up: |D_m|^2, |D|^2, the overlaps of bases, and how many they are.

    `of_owned`: they are of what this replica owns only, and of D_m what the replicas said of it.
    """

    own_norm: float = 0.0
    mean_norm: float = 0.0
    overlaps: float = 0.0
    refreshed: float = 0.0
    of_owned: bool = False

    def add_overlap(self, overlap: float | None, counts: bool) -> None:
        """Args: of a new basis with the old one, None if there was no old one; whether this rank's counts."""
        if overlap is not None and counts:
            self.overlaps += overlap
            self.refreshed += 1.0
