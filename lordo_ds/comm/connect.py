"""The process groups of a rank, made into what the optimizer communicates with."""

from __future__ import annotations

import torch

from lordo_ds.comm.groups import ReplicaGroups
from lordo_ds.comm.inside import InsideComm, InsideReplica
from lordo_ds.comm.slow_link import SlowLink
from lordo_ds.comm.wire import ReplicaWire


def connect(
    groups: ReplicaGroups,
    device: torch.device,
    slow_link: SlowLink | None,
    *,
    sharded: bool,
    only_data_parallel: bool = False,
) -> tuple[ReplicaWire, InsideReplica]:
    """The wire across replicas and the groups inside this one, for every kind of engine. Nothing is communicated.

    Args:
        groups: this rank's place on the mesh.
        device: where the stepped tensors of this rank are trained.
        slow_link: that the wire imitates from its first collective on, before an optimizer attaches; wires of one rank
            share it.
        sharded: the ranks of `groups.shard` each step a part of every tensor. Otherwise each of them steps whole
            tensors, the same ones: they are twins, who share out what crosses replicas, and a matrix has no shards.
            What they record of their own data differs either way.
        only_data_parallel: `groups.shard` is the whole replica (no pipeline, no tensor parallelism), and one
            communicator, with one ledger, is to serve for both.
    """
    rows = InsideComm(groups.shard)
    inside = InsideReplica(
        shard=rows if sharded else InsideComm(),
        tensor=InsideComm(groups.tensor),
        everyone=rows if only_data_parallel else InsideComm(groups.inside),
        rows=rows,
        device=device,
    )
    wire = ReplicaWire(groups.replica, twins=None if sharded else rows)
    wire.slow_link = slow_link
    return wire, inside
