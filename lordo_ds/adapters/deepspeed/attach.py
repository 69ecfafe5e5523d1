"""What DeepSpeed's wrappers step, and the mesh that they run on, given to the optimizer."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from lordo_ds.adapters.deepspeed.masters import gather_again_what_was_gathered, refresh_low_precision
from lordo_ds.adapters.deepspeed.model_watch import watch_engine
from lordo_ds.adapters.deepspeed.pipeline import tied_copies
from lordo_ds.adapters.deepspeed.saved_files import tell_header
from lordo_ds.adapters.deepspeed.wrappers import flat_tensors, shard_groups, stepped_tensors_in_groups
from lordo_ds.checkpoint.header import RESHAPE_HINT
from lordo_ds.comm.connect import connect
from lordo_ds.comm.equalise import equalise_untrained, warn_of_left_out
from lordo_ds.comm.groups import ReplicaGroups, groups_for, make_groups, own_purpose
from lordo_ds.comm.inside import InsideComm
from lordo_ds.comm.slow_link import SlowLink
from lordo_ds.core.grouping import model_facts
from lordo_ds.optimizer import LoRDO
from lordo_ds.replica.copies import TiedWeight
from lordo_ds.sync.background import BackgroundGroups


def attach_optimizer(engine: Any, groups: ReplicaGroups, version: str) -> None:
    """Give the engine's optimizer its tensors and its replicas. Collective: the replicas' weights are made equal."""
    optimizer: LoRDO = engine.basic_optimizer
    facts = model_facts(engine.module, groups.tensor_size)
    sharded, link = bool(shard_groups(engine)), SlowLink.of(optimizer.config.wire_throttle)
    wire, inside = connect(groups, engine.device, link, sharded=sharded)
    flats = flat_tensors(engine, facts)
    names = {piece.facts.name for flat in flats for piece in flat.pieces}
    trained = {parameter for parameter, fact in facts.items() if fact.name in names}
    left_out = [fact.name for p, fact in facts.items() if p.requires_grad and p not in trained and 0 not in fact.shape]
    warn_of_left_out(left_out)
    equalise_untrained(engine.module, trained, wire, engine.device)
    stage_ranks = {facts[p].name: ranks for p, ranks in tied_copies(engine.module)}
    tied, background = _tied_weights(stage_ranks, inside.shard), None
    if optimizer.config.streaming.delay_steps:
        purpose = own_purpose()
        beside = connect(groups_for(purpose, groups), engine.device, link, sharded=sharded)
        background = BackgroundGroups(*beside, _tied_weights(stage_ranks, inside.shard, purpose))
    optimizer.resume_hint = RESHAPE_HINT
    with stepped_tensors_in_groups(engine):
        optimizer.attach(flats, wire, inside, tied, background=background)
    tell_header(engine, groups, facts, trained)
    gather_again_what_was_gathered(engine, version)
    refresh_low_precision(engine)
    assert optimizer.sync is not None
    watch_engine(engine, optimizer.sync.outside, facts)


def _tied_weights(stage_ranks: dict[str, tuple[int, ...]], shard: InsideComm, purpose: str = "") -> list[TiedWeight]:
    """With the copies of all shards, which the stages cut in different places. Collective over all ranks."""
    holders = [list(stage_ranks.values())]
    if shard.size > 1:
        holders = [[]] * shard.size
        dist.all_gather_object(holders, list(stage_ranks.values()), group=shard.group)
    wanted = [sorted(rank for ranks in same for rank in ranks) for same in zip(*holders, strict=True)]
    groups = make_groups(wanted, purpose)
    me = dist.get_rank()
    return [
        TiedWeight(name, InsideComm(group), ranks.index(me), len(ranks))
        for (name, ranks), group in zip(stage_ranks.items(), groups, strict=True)
    ]
