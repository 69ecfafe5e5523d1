"""LoRDO (arXiv 2602.04396) for DeepSpeed and Megatron: low-rank optimizer states, infrequent communication.

Where DeepSpeed is installed, importing this package registers the optimizer type "LoRDO" with it. Without DeepSpeed
everything works but what takes one of its engines.
"""

from importlib.util import find_spec
from typing import Any

from lordo_ds.adapters.fsdp2.clip import clip_grad_norm_
from lordo_ds.adapters.fsdp2.mesh import replica_group, replica_mesh, shard_model
from lordo_ds.config import LordoConfig
from lordo_ds.errors import CheckpointError, ConfigError, SyncError
from lordo_ds.handle import data_sampler, hook
from lordo_ds.optimizer import LoRDO
from lordo_ds.status import status
from lordo_ds.version import __version__ as __version__

if find_spec("deepspeed") is not None:
    from lordo_ds.adapters.deepspeed.api import load_checkpoint, save_checkpoint
    from lordo_ds.adapters.deepspeed.registration import register, unregister
    from lordo_ds.adapters.deepspeed.zero_init import zero_init_group

    register()

__all__ = [
    "CheckpointError",
    "ConfigError",
    "LoRDO",
    "LordoConfig",
    "SyncError",
    "clip_grad_norm_",
    "data_sampler",
    "hook",
    "load_checkpoint",
    "register",
    "replica_group",
    "replica_mesh",
    "save_checkpoint",
    "shard_model",
    "status",
    "unregister",
    "zero_init_group",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        raise AttributeError(f"lordo_ds.{name} takes a DeepSpeed engine: pip install 'lordo_ds[deepspeed]'")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
