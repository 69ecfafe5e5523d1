"""The output directory of a run: the same one on all ranks, and no other job's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.launch import dist_rank

if TYPE_CHECKING:
    from lordo_ds.checkpoint.claim import Claim

CLAIM = "in_use.lordo.json"


@contextmanager
def claimed(folder: Path) -> Iterator[Claim | None]:
    """Claim it on rank 0, by a file that all ranks must see; held after the block too, unless that raises. Collective.

    Yields:
        The claim, on rank 0; None on the others.

    Raises:
        CheckpointError: another job writes there, or some ranks have another directory of that name.
    """
    from lordo_ds.adapters.shared_folder import check_shared
    from lordo_ds.checkpoint.claim import Claim
    from lordo_ds.comm.agreement import agreed
    from lordo_ds.disk import make_folder

    def take() -> Claim | None:
        if dist_rank():
            return None
        make_folder(folder)
        return Claim.take(folder / CLAIM, f"--output-dir {folder}")

    claim = agreed(take)
    try:
        check_shared(folder / CLAIM, claim and claim.owner.token, folder)
        yield claim
    except BaseException:
        if claim is not None:
            claim.release()
        raise


def check_claim(claim: Claim | None) -> None:
    """Refuse to write when another job has taken the directory over. Collective.

    Raises:
        CheckpointError: it has.
    """
    from lordo_ds.comm.agreement import agreed

    agreed(lambda: claim and claim.check())
