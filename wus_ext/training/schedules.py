"""The learning rate of each epoch."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from .config import TrainConfig

__all__ = ["build_scheduler", "factor"]


def factor(config: TrainConfig, epoch: int) -> float:
    """What the learning rate is multiplied by in an epoch, counted from 0.

    >>> config = TrainConfig(epochs=6, lr_warmup=2, schedule="cosine")
    >>> [round(factor(config, epoch), 2) for epoch in range(7)]
    [0.33, 0.67, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if epoch < config.lr_warmup:
        return (epoch + 1) / (config.lr_warmup + 1)
    if config.schedule == "cosine":
        done = (epoch - config.lr_warmup) / (config.epochs - config.lr_warmup)
        return (1 + math.cos(math.pi * done)) / 2
    if config.schedule == "step":
        drops = {max(1, round(part * config.epochs)) for part in config.milestones}
        return config.gamma ** sum(epoch >= drop for drop in drops)
    return 1.0


def build_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer) -> LambdaLR | None:
    """The scheduler of ``config``, to be stepped once an epoch; ``None`` for a constant rate."""
    if config.schedule == "constant" and not config.lr_warmup:
        return None
    return LambdaLR(optimizer, lambda epoch: factor(config, epoch))
