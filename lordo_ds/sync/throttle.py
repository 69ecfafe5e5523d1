"""`wire_throttle`: the wire across replicas is made to imitate a slow link, and the log says so."""

from __future__ import annotations

import logging

from lordo_ds.comm.slow_link import SlowLink
from lordo_ds.comm.wire import ReplicaWire
from lordo_ds.config import LordoConfig

logger = logging.getLogger("lordo_ds")


def throttle(config: LordoConfig, wire: ReplicaWire) -> None:
    """As the settings want it, however the wire was made."""
    if wire.slow_link is None:
        wire.slow_link = SlowLink.of(config.wire_throttle)


def warn_of_throttle(config: LordoConfig, wire: ReplicaWire, sync_bytes: int) -> None:
    """That this replica is held back, and where a sync will then take longer than a rank may be stuck.

    Args:
        sync_bytes: that a rank sends in an ordinary sync.
    """
    link = wire.slow_link
    if link is None:
        return
    logger.warning(
        "LoRDO: %s holds back what replica %d sends to the others as a link of %g Mbit/s and %g ms latency would: for "
        "measurements only, take it out to train",
        config.key("wire_throttle"), wire.index, link.mbit_per_s, link.latency_ms,
    )  # fmt: skip
    seconds = link.seconds(sync_bytes, hops=0)
    if seconds > config.sync_timeout_s:
        logger.warning(
            "LoRDO: with %s a sync takes more than %.0f s, and %s = %g: give it more than that",
            config.key("wire_throttle"), seconds, config.key("sync_timeout_s"), config.sync_timeout_s,
        )  # fmt: skip
