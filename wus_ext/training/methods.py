"""The methods to compare: which layers a network has, and who decides when to skip."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import lr_scheduler

from ..conversion.convert import convert, revert
from ..conversion.windows import set_skip, skip_weight_updates, trains_nothing
from ..methods.table import METHODS, Policy
from .config import TrainConfig
from .errors import ConfigError
from .networks import MODELS, build_network

__all__ = ["build_model", "build_policy", "check_layers"]


def build_model(
    config: TrainConfig, classes: int, build: Callable[[int], nn.Module] | None = None
) -> nn.Module:
    """The network of ``config`` with random weights, converted to skip or, for the baseline, not.

    Args:
        config: names the network and the method.
        classes: number of outputs.
        build: makes the network instead, given ``classes``.
    """
    if build is not None:
        model = build(classes)
    else:
        model = build_network(config.model, classes, dropout=config.dropout)
    if not METHODS[config.method].converts:
        return revert(model)
    return convert(model, **config.skip_settings())


def build_policy(
    config: TrainConfig, model: nn.Module, scheduler: lr_scheduler.LRScheduler | None
) -> Policy | None:
    """Who decides when ``config``'s run skips; ``None`` without skipping.

    Raises:
        ConfigError: ``skip_layers`` means no layer of ``model``, or nothing would ever train.
    """
    build = METHODS[config.method].build
    if build is None:
        return None
    check_layers(config, model)
    layers = config.skip_layers or None
    settings = config.policy_settings()
    try:
        with skip_weight_updates(model, layers=layers):
            nothing = trains_nothing(model)
        policy = build(model, scheduler, layers=layers, lr_drop=config.lr_drop, **settings)
    except ValueError as error:
        setting = "skip_" if str(error).startswith("layers") else ""
        raise ConfigError(f"{setting}{error}") from error
    if nothing and not METHODS[config.method].always:
        raise ConfigError(
            f"model {config.model!r} has no bias, so nothing would train in a skip window: use "
            "--skip-layers, --train-gamma if it has norm layers, or --method baseline"
        )
    return policy


def check_layers(config: TrainConfig, model: nn.Module | None = None) -> None:
    """Check ``skip_layers`` against a converted model, by default the network of ``config``.

    Raises:
        ConfigError: a pattern matches nothing, or all together nothing that can skip.
    """
    if METHODS[config.method].build is None or not config.skip_layers:
        return
    if model is None:
        # Names are all that is needed; others may compute with values as they are made.
        with torch.device("meta" if config.model in MODELS else "cpu"):
            model = build_model(config, classes=2)
    try:
        set_skip(model, False, layers=config.skip_layers)
    except ValueError as error:
        raise ConfigError(f"skip_{error}") from error
