"""Loads any saved run into an engine of any layout: every rank cuts its own parts out of whole parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lordo_ds.adapters.deepspeed.loading import common_tag, restore_rank, tell
from lordo_ds.adapters.deepspeed.masters import refresh_low_precision
from lordo_ds.adapters.deepspeed.untrained import Untrained, check_untrained, fill_untrained
from lordo_ds.adapters.deepspeed.wrappers import stepped_tensors_in_groups
from lordo_ds.checkpoint.files import verify
from lordo_ds.checkpoint.finite import NotFinite, not_finite
from lordo_ds.checkpoint.header import Header
from lordo_ds.checkpoint.native_run import NativeRun
from lordo_ds.checkpoint.open import open_run
from lordo_ds.checkpoint.pieces import Place, State, cut
from lordo_ds.checkpoint.portable import is_portable
from lordo_ds.checkpoint.replica_folders import replica_numbers
from lordo_ds.checkpoint.reshaped_run import ReshapedRun, check_settings, with_rank
from lordo_ds.checkpoint.run import EngineState, SavedParameter, SavedRun
from lordo_ds.comm.agreement import agreed
from lordo_ds.comm.groups import ReplicaGroups, of_all_ranks
from lordo_ds.core.state import MOMENTA, OWNED, PLAIN_VALUES
from lordo_ds.errors import CheckpointError
from lordo_ds.optimizer import LoRDO
from lordo_ds.replica.fragment import Fragment
from lordo_ds.saved_state import restore_counters

logger = logging.getLogger("lordo_ds")


def load_reshaped(
    engine: Any, groups: ReplicaGroups, load_dir: str | Path, tag: str | None = None, strict: bool = True
) -> tuple[str, dict[str, Any]]:
    """Load a checkpoint of any replica count, shard count, ZeRO stage, TP, PP, precision and rank. Collective.

    Everything is checked on all ranks before anything is changed.

    Args:
        strict: frozen parameters and buffers must have the names that were saved; otherwise the differences are said
            in the log, and stay as they are.

    Returns:
        (its directory, the client state that one of its replicas saved).

    Raises:
        CheckpointError: it is not complete, damaged, or of another model.
    """
    folder = Path(load_dir)
    if tag is not None or not (is_portable(folder) or replica_numbers(folder)):
        found = common_tag(load_dir, tag)
        if found is None:
            raise CheckpointError(f"LoRDO: {load_dir} holds no checkpoint: neither `latest` nor replica_0; give tag=")
        folder = folder / found
    optimizer: LoRDO = engine.basic_optimizer
    with stepped_tensors_in_groups(engine):
        here = optimizer.header()
    agreed(lambda: verify(folder, dist.get_rank(), dist.get_world_size()))
    run = agreed(lambda: ReshapedRun(open_run(folder, check=False), groups.layout.replica_count))
    trained = {fragment.name for fragment in here.fragments}
    untrained = Untrained.of(engine, groups, trained)
    each = of_all_ranks((trained, untrained.names))
    known, known_untrained = (set().union(*names) for names in zip(*each, strict=True))
    agreed(lambda: _check(run, here, known, folder))
    agreed(lambda: _check_states(run, here, groups.replica_index))
    saved = agreed(lambda: run.untrained(groups.replica_index))
    left = agreed(lambda: check_untrained(untrained, saved, known_untrained, folder, strict))
    spoilt = agreed(lambda: _not_finite(run, groups))
    tell(folder, left, spoilt, run.replicas)
    state = agreed(lambda: run.engine_state(groups.replica_index))
    with stepped_tensors_in_groups(engine):
        _fill_optimizer(optimizer, run, here, groups.replica_index)
        _fill_groups(optimizer, state)
    replica = groups.replica_index
    restore_counters(optimizer, run.counters(replica), run.bytes_sent(replica), run.rows())
    fill_untrained(untrained, saved, groups)
    _fill_engine(engine, state)
    refresh_low_precision(engine)
    if isinstance(run.run, NativeRun):
        restore_rank(folder, groups, optimizer)
    if engine.global_rank == 0:
        for note in run.notes:
            logger.warning("LoRDO: %s: %s", folder, note)
    return str(folder), dict(state.client_state)


# -- checks ------------------------------------------------------------------------------------------


def _check(run: SavedRun, here: Header, known: set[str], folder: Path) -> None:
    """Refuse what is not this model, or cannot become this run.

    Args:
        known: the parameters of all ranks together.
    """
    check_settings(run.settings, here.settings, str(folder))
    surplus = sorted(set(run.parameters) - known)
    if surplus:
        raise CheckpointError(
            f"LoRDO: {folder} holds {len(run.parameters)} parameters, this model {len(known)}: "
            f"{surplus[0]!r} is not in it"
        )
    for layout in here.fragments:
        saved = run.parameters.get(layout.name)
        if saved is None:
            raise CheckpointError(
                f"LoRDO: {folder} holds {len(run.parameters)} parameters, this model {len(known)}: "
                f"{layout.name!r} is not saved"
            )
        for what, theirs, ours in (
            ("shape", saved.shape, layout.whole_shape),
            ("projection", saved.low_rank, layout.low_rank),
            ("side of the basis", saved.side, layout.side),
        ):
            if theirs != ours:
                raise CheckpointError(
                    f"LoRDO: {folder}: {what} of {layout.name}: saved {theirs!r}, this run {ours!r}: give the model "
                    "and optimizer.params.low_rank that it was saved with"
                )


def _check_states(run: ReshapedRun, here: Header, replica: int) -> None:
    for layout in here.fragments:
        run.check_state(layout.name, replica)


def _not_finite(run: ReshapedRun, groups: ReplicaGroups) -> list[NotFinite]:
    """Of what this replica will take; its ranks share the parameters out, each is read once for this."""
    inside = dist.get_process_group_ranks(groups.inside)
    names = sorted(run.parameters)[inside.index(dist.get_rank()) :: len(inside)]
    replica = groups.replica_index
    return [one for name in names for one in not_finite(replica, name, run.state(name, replica))]


# -- filling -----------------------------------------------------------------------------------------


@torch.no_grad()
def _fill_optimizer(optimizer: LoRDO, run: ReshapedRun, here: Header, replica: int) -> None:
    assert optimizer.sync is not None
    layouts = {layout.name: layout for layout in here.fragments}
    for fragment in optimizer.sync.items:
        layout = layouts[fragment.plan.name]
        state = run.state(layout.name, replica)
        state = _of_owners(state, run, layout.name, replica)
        if layout.low_rank:
            wanted = SavedParameter(layout.name, layout.whole_shape, True, layout.side, layout.rank)
            state = with_rank(state, wanted)
        _fill_fragment(fragment, state, Place(layout, fragment.intervals, here.mesh.shard, here.mesh.slice))


def _of_owners(state: State, run: ReshapedRun, name: str, replica: int) -> State:
    """With what the owners kept, of all elements, and as the momentum that this run keeps, wherever it steps."""
    owned = [key for key in OWNED if key in state]
    if owned:
        state = {**state, **{key: run.state(name, 0)[key] for key in owned}}
    for kept, other in (MOMENTA, MOMENTA[::-1]):
        if kept not in state and other in state:
            state = {**state, kept: state[other]}
    return state


def _fill_fragment(fragment: Fragment, state: State, place: Place) -> None:
    """Weights and state of one fragment; what was not saved starts anew."""
    fragment.weight.copy_(cut("weight", state["weight"], place))
    for key, current in fragment.state.items():
        if key in PLAIN_VALUES:
            fragment.state[key] = PLAIN_VALUES[key](state.get(key, 0))
        elif key in state:
            current.copy_(cut(key, state[key], place))
        elif key == "anchor":  # a single replica may have kept none
            current.copy_(fragment.weight)
        else:
            current.zero_()
    fragment.waiting.forget_gradients()


def _fill_groups(optimizer: LoRDO, state: EngineState) -> None:
    """Learning rates and the like, as far as the groups are the same ones."""
    if len(state.param_groups) == len(optimizer.param_groups):
        for group, saved in zip(optimizer.param_groups, state.param_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})


def _fill_engine(engine: Any, state: EngineState) -> None:
    engine.global_steps, engine.skipped_steps = state.global_steps, state.skipped_steps
    engine.global_samples = state.global_samples
    if engine.lr_scheduler is not None and state.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(state.lr_scheduler)
    scaler = getattr(engine.optimizer, "loss_scaler", getattr(engine.optimizer, "loss_scale_config", None))
    if scaler is not None and engine.fp16_enabled():
        _fill_scaler(scaler, state.loss_scale)


def _fill_scaler(scaler: Any, saved: Mapping[str, float | int]) -> None:
    for name, value in saved.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
