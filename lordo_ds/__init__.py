"""LoRDO (arXiv 2602.04396) for DeepSpeed and Megatron: low-rank optimizer states, infrequent communication.

Importing this package registers the optimizer type "LoRDO" with DeepSpeed.
"""

from lordo_ds.adapters.deepspeed.api import data_sampler, hook, load_checkpoint, save_checkpoint, status
from lordo_ds.adapters.deepspeed.registration import register, unregister
from lordo_ds.adapters.deepspeed.zero_init import zero_init_group
from lordo_ds.config import LordoConfig
from lordo_ds.errors import CheckpointError, ConfigError, SyncError
from lordo_ds.optimizer import LoRDO

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "ConfigError",
    "LoRDO",
    "LordoConfig",
    "SyncError",
    "data_sampler",
    "hook",
    "load_checkpoint",
    "register",
    "save_checkpoint",
    "status",
    "unregister",
    "zero_init_group",
]

register()
