"""Checkpoints as files: what a saved run holds, read, checked, reshaped and exported without processes or the model."""

from lordo_ds.checkpoint.files import read_saved
from lordo_ds.checkpoint.open import open_run
from lordo_ds.checkpoint.reshaped_run import ReshapedRun
from lordo_ds.checkpoint.rng import rng_state, set_rng_state
from lordo_ds.checkpoint.run import EngineState, SavedParameter, SavedRun
from lordo_ds.errors import CheckpointError

__all__ = [
    "CheckpointError",
    "EngineState",
    "ReshapedRun",
    "SavedParameter",
    "SavedRun",
    "open_run",
    "read_saved",
    "rng_state",
    "set_rng_state",
]
