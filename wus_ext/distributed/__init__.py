"""Skip steps in several processes."""

from .ddp import DistributedDataParallel

__all__ = ["DistributedDataParallel"]
