"""What moves the parameters of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .config import TrainConfig

__all__ = ["build_optimizer", "check_state", "momentum_of"]

#: The running mean of gradients, in SGD and in AdamW.
_MOMENTA = ("momentum_buffer", "exp_avg")


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of ``config`` for all parameters of ``model``."""
    given: dict[str, Any] = {
        "lr": config.rate(), "weight_decay": config.weight_decay, "fused": True
    }  # fmt: skip
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **given, capturable=config.cuda_graphs)
    return torch.optim.SGD(model.parameters(), **given, momentum=config.momentum)


def momentum_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.Tensor | None:
    """The running mean of a parameter's gradients; ``None`` before the first."""
    state = optimizer.state.get(parameter, {})
    return next((state[name] for name in _MOMENTA if state.get(name) is not None), None)


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Check a loaded state against the parameters.

    Raises:
        ValueError: something is kept for another shape.
    """
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{name} of {list(value.shape)}")
