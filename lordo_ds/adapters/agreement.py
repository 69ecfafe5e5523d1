"""All ranks act on a checkpoint, or none does."""

from lordo_ds.dist.agreement import agreed

__all__ = ["agreed"]
