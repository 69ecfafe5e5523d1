"""The optimizer's state as it is saved: its header, whether a saved one fits this run, and how it is filled in."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lordo_ds.checkpoint.finite import NotFinite, not_finite, replicas_to_reseed
from lordo_ds.checkpoint.header import (
    STATE_FORMAT,
    Counters,
    EngineFacts,
    FragmentLayout,
    Header,
    Mesh,
    refuse_differences,
)
from lordo_ds.comm.agreement import agreed
from lordo_ds.comm.groups import of_all_ranks
from lordo_ds.comm.inside import InsideReplica
from lordo_ds.config import LordoConfig
from lordo_ds.core.grouping import ParameterFacts
from lordo_ds.core.state import MOMENTA, OWNED, WIRE_ERRORS
from lordo_ds.errors import CheckpointError
from lordo_ds.ranks import Ranks
from lordo_ds.replica.allocate import Held
from lordo_ds.replica.fragment import Fragment
from lordo_ds.sync.outer_sync import OuterSync
from lordo_ds.sync.traffic import Traffic
from lordo_ds.watch.unwatched import Unwatched

logger = logging.getLogger("lordo_ds")

_MOMENTUM_HINT = (
    "it was saved with another outer.compute, or in another layout, where other replicas own it: load it with "
    "lordo_ds.load_checkpoint(engine, ..., reshape=True), or as it was saved"
)
# Of `OuterSync`, saved with the steps.
SYNC_COUNTERS = ("syncs", "nonfinite_syncs", "left_out_syncs", "last_synced_step")


class Run(Protocol):
    """What is read of the optimizer whose state this is, and set in it: see `LoRDO`."""

    config: LordoConfig
    param_groups: list[dict[str, Any]]
    held: Held
    ranks: Ranks
    sync: OuterSync | None
    attempted_steps: int
    executed_steps: int
    pipe_stage: int
    pipe_stages: int
    engine_facts: EngineFacts
    resume_hint: str
    managed: bool
    watchdog: Unwatched

    def _attach_alone(self, resuming: bool = False) -> None: ...

    def _detach(self) -> None: ...

    def drain(self, before_load: bool = False) -> bool: ...


# -- the header --------------------------------------------------------------------------------------


def header_of(run: Run) -> Header:
    """What this rank's state is, and where it lies; the parameter groups must hold the stepped tensors.

    Raises:
        CheckpointError: a sync is in flight, which is no part of a state.
    """
    sync, held = run.sync, run.held
    if sync is not None and sync.streaming.flight is not None:
        raise CheckpointError(
            "LoRDO: a sync is in flight: call drain(), of the optimizer or of an engine's handle, on all ranks before "
            "weights and states are saved"
        )
    inside = sync.inside if sync else InsideReplica()
    numbers = {tensor: i for i, tensor in enumerate(_stepped(run))}
    facts = {fact.name: fact for fact in held.facts}
    header = Header(
        format=STATE_FORMAT,
        settings=run.config.model_dump(mode="json"),
        mesh=Mesh(
            replicas=sync.wire.replicas if sync else 1,
            replica=sync.wire.index if sync else 0,
            shards=inside.shard.size,
            shard=inside.shard.index,
            slices=inside.tensor.size,
            slice=inside.tensor.index,
            stages=run.pipe_stages,
            stage=run.pipe_stage,
        ),
        fragments=tuple(
            _layout_of(fragment, facts[fragment.plan.name], numbers[tensor])
            for tensor, fragments in held.of_tensor.items()
            for fragment in fragments
        ),
        engine=run.engine_facts,
        counters=Counters(
            attempted_steps=run.attempted_steps,
            executed_steps=run.executed_steps,
            **{name: getattr(sync, name) if sync else 0 for name in SYNC_COUNTERS},
        ),
        bytes_sent=sync.wire.ledger.state_dict() if sync else {},
        rows=tuple(tuple(row) for row in sync.rows.pending) if sync else (),
    )
    return run.ranks.header(header)


def _stepped(run: Run) -> list[Tensor]:
    """In the order of the groups, which torch's `state_dict` numbers them by."""
    return [tensor for group in run.param_groups for tensor in group["params"]]


def _layout_of(fragment: Fragment, fact: ParameterFacts, tensor: int) -> FragmentLayout:
    plan = fragment.plan
    return FragmentLayout(
        name=plan.name,
        shape=plan.shape,
        partition_dim=fact.partition_dim,
        partitions=fact.partitions,
        partition_stride=fact.partition_stride,
        low_rank=plan.low_rank,
        side=plan.side,
        rank=plan.rank,
        interval=fragment.intervals[fragment.comm.index],
        tensor=tensor,
        offset=fragment.offset,
        copied=fragment.tied_copy,
        owned=_owned(fragment),
    )


def _owned(fragment: Fragment) -> tuple[int, int]:
    """In elements of the slice; (0, 0) for none."""
    first, (start, stop) = fragment.intervals[fragment.comm.index][0], fragment.owned
    return (first + start, first + stop) if stop > start else (0, 0)


# -- whether a saved state fits ----------------------------------------------------------------------


def check(run: Run, state_dict: Mapping[str, Any]) -> Header:
    """See `LoRDO.check_state_dict`. Collective over all ranks where the optimizer has not attached yet."""
    return _checked(run, state_dict)[0]


def _checked(run: Run, state_dict: Mapping[str, Any]) -> tuple[Header, Mapping[str, Any]]:
    """The header, and the state with what this rank holds of every tensor."""
    if run.sync is not None:
        saved, state = _read(run, state_dict)
        _check_fits(run, saved, state)
        return saved, state
    if run.managed:
        raise ValueError("LoRDO: load the state after deepspeed.initialize, through the engine")
    # Attaching is collective: all ranks resume, or none does.
    saved, state = agreed(lambda: _read(run, state_dict))
    run._attach_alone(resuming=bool(saved.fragments))
    try:
        agreed(lambda: _check_fits(run, saved, state))
        _check_finite(run, saved, state)
    except CheckpointError:
        run._detach()
        raise
    return saved, state


def _read(run: Run, state_dict: Mapping[str, Any]) -> tuple[Header, Mapping[str, Any]]:
    state = run.ranks.unpack(state_dict)
    return Header.of(state, "this optimizer state"), state


def _check_fits(run: Run, saved: Header, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state that lies otherwise, means something else, or lacks a part; `saved` is its header.

    Raises:
        CheckpointError: naming the first difference. Nothing is changed.
    """
    names, saved_names = [plan.name for plan in run.held.plans], [fragment.name for fragment in saved.fragments]
    if saved_names and saved_names != names:
        odd = next((pair for pair in zip(saved_names, names, strict=False) if pair[0] != pair[1]), ("", ""))
        raise CheckpointError(
            f"LoRDO: the saved state holds {len(saved_names)} parameters, this model {len(names)}; "
            f"first difference: {odd[0]!r} against {odd[1]!r}"
        )
    refuse_differences(saved, header_of(run), "the saved state", run.config.key(""), run.resume_hint)
    _check_owned(run, saved)
    states, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not (isinstance(states, dict) and isinstance(groups, list) and all(isinstance(one, dict) for one in groups)):
        raise CheckpointError("LoRDO: the saved state has no states, or no parameter groups: it is damaged")
    if len(groups) != len(run.param_groups):
        raise CheckpointError(
            f"LoRDO: the saved state has {len(groups)} parameter groups, this run {len(run.param_groups)}"
        )
    if saved_names:
        for fragment, entries in _with_saved(run, saved, state_dict):
            _check_entries(fragment, entries)


def _check_owned(run: Run, saved: Header) -> None:
    inside = run.sync.inside if run.sync else InsideReplica()
    here = inside.shard.size, inside.tensor.size
    owners = any("owner_momentum" in fragment.state for fragment in run.held.fragments)
    if owners and saved.owned_over not in (None, here):
        raise CheckpointError(
            f"LoRDO: the saved state is of replicas with (shards, tensor slices) {saved.owned_over}, this run has "
            f"{here}, where a replica owns, and keeps the outer momentum of, other parameters: load it with as many"
        )


def _with_saved(run: Run, saved: Header, state_dict: Mapping[str, Any]) -> list[tuple[Fragment, Any]]:
    """Every fragment and what was saved of it."""
    owned: dict[str, tuple[int, int] | None] = {layout.name: layout.owned for layout in saved.fragments}
    if saved.owned_over is not None:
        owned = dict.fromkeys(owned)
    found = []
    for index, tensor in enumerate(_stepped(run)):
        for fragment in run.held.of_tensor.get(tensor, ()):
            entries = state_dict["state"].get(index, {}).get(fragment.plan.name, {})
            found.append((fragment, _as_kept_here(fragment, entries, owned[fragment.plan.name])))
    return found


def _check_entries(fragment: Fragment, saved: Any) -> None:
    """Refuse by name what is missing, surplus or of another kind, shape or dtype; nothing is changed before that."""
    name = fragment.plan.name
    if not isinstance(saved, dict):
        raise CheckpointError(f"LoRDO: the saved state of {name} is a {type(saved).__name__}: it is damaged")
    for key in sorted(fragment.state.keys() ^ saved.keys()):
        where = "no" if key in fragment.state else "a surplus"
        hint = _MOMENTUM_HINT if key in MOMENTA else "was it saved with other settings?"
        raise CheckpointError(f"LoRDO: the saved state of {name} has {where} {key!r}: {hint}")
    for key, current in fragment.state.items():
        value = saved[key]
        if isinstance(current, Tensor):
            wanted = f"{tuple(current.shape)} {current.dtype}"
            found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        else:
            wanted, found = type(current).__name__, type(value).__name__
        if found != wanted:
            raise CheckpointError(f"LoRDO: {key!r} of {name} is {found} in the saved state and {wanted} here")


def _as_kept_here(fragment: Fragment, saved: Any, owned: tuple[int, int] | None) -> Any:
    """What was saved of a fragment, as far as it lies otherwise only because of the wire.

    A momentum of all elements has that of the owned ones in it. Another wire starts with nothing unsaid.

    Args:
        owned: the elements of the slice that the replica owned when it was saved, where that is known.
    """
    if not isinstance(saved, dict):
        return saved
    found, here = dict(saved), fragment.state
    whole = found.get("outer_momentum")
    if owned is not None and owned != _owned(fragment):
        found = {key: value for key, value in found.items() if key not in OWNED}
    if "owner_momentum" in here and isinstance(whole, Tensor) and whole.shape == (fragment.numel,):
        del found["outer_momentum"]
        found["owner_momentum"] = whole[slice(*fragment.owned)]
    for key in OWNED:
        if key in here and isinstance(found.get(key), Tensor) and found[key].shape == (fragment.numel,):
            found[key] = found[key][slice(*fragment.owned)]  # of all elements
    for key in WIRE_ERRORS:
        if key not in here:
            found.pop(key, None)
        elif key not in found:
            found[key] = torch.zeros_like(here[key])
    return found


def _check_finite(run: Run, saved: Header, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state, and weights, that are not finite where no sync can mend it. Collective over all ranks.

    Raises:
        CheckpointError: the same one on all ranks.
    """
    assert run.sync is not None
    wire, found = run.sync.wire, list[NotFinite]()
    for fragment, entries in _with_saved(run, saved, state_dict) if saved.fragments else ():
        found += not_finite(wire.index, fragment.plan.name, {"weight": fragment.weight, **entries})
    reseeded = reseeded_later(found, wire.replicas, "the saved state")
    if reseeded and wire.index == 0:
        logger.warning("LoRDO: replicas %s were saved when not finite: the next sync reseeds them", reseeded)


def reseeded_later(found: list[NotFinite], replicas: int, where: str) -> list[int]:
    """The replicas that the next sync will reseed, from what each rank found not to be finite. Collective over all.

    Raises:
        CheckpointError: a sync cannot mend it.
    """
    return replicas_to_reseed([one for some in of_all_ranks(found) for one in some], replicas, where)


# -- filling -----------------------------------------------------------------------------------------


def load(run: Run, state_dict: Mapping[str, Any]) -> None:
    """See `LoRDO.load_state_dict`."""
    run.drain(before_load=True)
    saved, state_dict = _checked(run, state_dict)
    assert run.sync is not None
    if saved.fragments:  # a state saved before the first step has nothing but its settings
        for fragment, entries in _with_saved(run, saved, state_dict):
            _fill_fragment(fragment, entries)
    for group, saved_group in zip(run.param_groups, state_dict["param_groups"], strict=True):
        group.update({key: value for key, value in saved_group.items() if key != "params"})
    restore_counters(run, saved.counters, saved.bytes_sent, saved.rows)
    if not saved.fragments:
        run.sync.outside.record()


def _fill_fragment(fragment: Fragment, saved: Mapping[str, Any]) -> None:
    for key, current in fragment.state.items():
        if isinstance(current, Tensor):
            current.copy_(saved[key])
        else:
            fragment.state[key] = saved[key]


def restore_counters(
    run: Run, counters: Counters, bytes_sent: Mapping[str, int], rows: Sequence[Sequence[float]]
) -> None:
    """Go on counting where a saved run was."""
    sync = run.sync
    assert sync is not None
    run.attempted_steps, run.executed_steps = counters.attempted_steps, counters.executed_steps
    sync.bases.look_again()
    sync.faults.doubtful = False  # about steps that are undone
    sync.outside.forget()
    for name in SYNC_COUNTERS:
        setattr(sync, name, getattr(counters, name))
    sync.landed_step = sync.last_synced_step
    sync.wire.ledger.load_state_dict(dict(bytes_sent))
    sync.traffic = Traffic(run.attempted_steps, sync.counted())
    sync.rows.pending = [list(row) for row in rows]
    run.watchdog.resumed(run.attempted_steps, sync.last_synced_step)
