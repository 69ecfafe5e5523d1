"""What LoRDO raises where a user, a file or a machine is to blame; every message is one line with a way out."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that LoRDO cannot honour; the message is one line and says what to write instead."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line that says why and what to do."""


class SyncError(RuntimeError):
    """The replicas, or the copies inside one, can no longer be trusted to be equal; training must not go on."""
