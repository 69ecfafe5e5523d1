"""Who takes part in what crosses replicas: asked at its edges, answered by whoever runs the replicas."""

from __future__ import annotations

from collections.abc import Callable

from lordo_ds.config import LordoConfig


class Members:
    """The replicas that started the run; all are there at every sync, and those that are fit take part.

    Where replicas come and go (`lordo_ds.adapters.torchft`), a subclass says who is there: `OuterSync.use_wire`.

    `changing`: others may be there at the next sync, so that one replica, too, keeps what several need.
    `why_left_out` is what a replica that is not finite may have been.
    """

    changing = False
    why_left_out = "not finite"

    def around(self, cross: Callable[[], bool], final: bool = False) -> bool:
        """Run what crosses replicas at the end of a step, if something is due; Collective over them.

        Args:
            cross: returns whether weights changed. It can be run again once what it changed is undone.
            final: of the final sync, when something always is.

        Returns:
            Whether weights changed.
        """
        return cross()

    def least(self, config: LordoConfig, replicas: int) -> int:
        """How many fit replicas a sync needs."""
        return config.least_participants(replicas)
