"""What a replica owns of the parameters, and room for what it keeps of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig
from lordo_ds.core.codec import codec_of
from lordo_ds.costs import ownership
from lordo_ds.replica.fragment import Fragment
from lordo_ds.replica.placed import placed


def share_out_(
    config: LordoConfig, buckets: Sequence[Sequence[Fragment]], wire: ReplicaWire, owners: bool, lossy: bool
) -> None:
    """Say of every parameter what this replica owns of it, and make room for momenta and errors; zero where it is new.

    Args:
        buckets: with anchors.
        owners: whether the outer step runs at the owners.
        lossy: whether what crosses the wire is rounded.
    """
    has_momentum, block = not config.outer.is_plain_average, codec_of(config.pseudo_gradient_dtype).block
    for bucket in buckets if owners or lossy else ():
        items = [item for item in bucket if "anchor" in item.state]
        mine = ownership([item.holding for item in items], wire.replicas, owners, block)[wire.index]
        owned = {segment.item: (segment.start, segment.stop) for segment in mine}
        for place, item in enumerate(items):
            start, stop = owned.get(place, (0, 0))
            anew = item.owned != (start, stop)
            item.owned = start, stop
            if lossy and "wire_error" not in item.state:
                item.state["wire_error"] = _zeros(config, item.weight)
            for name, wanted in (("owner_error", lossy), ("owner_momentum", owners and has_momentum)):
                if wanted and (anew or name not in item.state):
                    item.state[name] = _zeros(config, item.weight[start:stop])
    for bucket in buckets if has_momentum else ():
        for item in bucket:
            if owners:
                item.state.pop("outer_momentum", None)
            elif "outer_momentum" not in item.state:
                item.state["outer_momentum"] = _zeros(config, item.weight)


def _zeros(config: LordoConfig, like: Tensor) -> Tensor:
    return placed(torch.zeros_like(like), config.anchor, torch.float32)
