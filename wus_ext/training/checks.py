"""Which settings of a run are good, one by one and together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from ..distributed import processes
from ..methods.rules import Settings
from ..methods.table import METHODS
from .errors import ConfigError
from .settings import check_types
from .tensorboard import check_tensorboard

if TYPE_CHECKING:
    from .config import TrainConfig

__all__ = ["machine", "values"]

#: The least that an integer may be, where it is not None.
_LEAST = {
    **{"epochs": 1, "batch_size": 1, "seed": 0, "workers": 0, "limit_train": 1, "limit_test": 1},
    **{"full_every": 2, "image_size": 1, "lr_warmup": 0, "early_stop": 1},
}
#: What a number must be, where it is not None.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "dropout": ("in [0, 1)", lambda x: 0 <= x < 1),
    "lr": ("positive", lambda x: x > 0),
    "momentum": ("in [0, 1)", lambda x: 0 <= x < 1),
    "weight_decay": ("at least 0", lambda x: x >= 0),
    "label_smoothing": ("in [0, 1)", lambda x: 0 <= x < 1),
    "clip_grad_norm": ("positive", lambda x: x > 0),
    "gamma": ("in (0, 1)", lambda x: 0 < x < 1),
    "validation": ("in [0, 1)", lambda x: 0 <= x < 1),
    "memory_budget": ("at least 0", lambda x: x >= 0),
    "packed_budget": ("in [0, 2**33)", lambda x: 0 <= x < 2**33),
    "lr_drop": ("in (0, 1)", lambda x: 0 < x < 1),
    "bias_lr": ("positive", lambda x: x > 0),
}


def values(config: TrainConfig) -> None:
    """Check what does not depend on the machine.

    Raises:
        ConfigError: naming the first setting that is wrong, its value and what is wanted.
    """
    check_types(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "choices" in field.metadata:
            _one_of(field.name, value, field.metadata["choices"])
        if "check" in field.metadata:
            field.metadata["check"](value)
        if value is None:
            continue
        if field.name in _LEAST and value < _LEAST[field.name]:
            raise ConfigError(f"{field.name} must be at least {_LEAST[field.name]}, got {value}")
        if field.name in _RANGES:
            _number(field.name, value, *_RANGES[field.name])
    for milestone in config.milestones:
        _number("milestones", milestone, "fractions in (0, 1)", lambda x: 0 < x < 1)
    try:
        Settings(**config.policy_settings())
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    _together(config)


def _together(config: TrainConfig) -> None:
    if config.watch == "validation" and config.validation == 0:
        raise ConfigError("watch='validation' needs a validation fraction above 0")
    if config.early_stop is not None and config.validation == 0:
        raise ConfigError("early_stop needs a validation fraction above 0")
    if config.augmentation() == "resized" and config.dataset != "folder":
        raise ConfigError("augment='resized' needs the dataset 'folder', or use 'crop'")
    if config.train_gamma and config.skip_settings()["norm"] == "frozen":
        instead = "" if config.norm == "frozen" else f", and method {config.method!r} freezes them"
        raise ConfigError(
            f"train_gamma needs norm 'batch': a layer that trains is not frozen{instead}"
        )
    if config.lr_warmup >= config.epochs:
        raise ConfigError(
            f"lr_warmup must be less than the {config.epochs} epochs, got {config.lr_warmup}"
        )
    if METHODS[config.method].needs_schedule and config.schedule == "constant":
        raise ConfigError(
            f"method {config.method!r} needs the schedule 'cosine' or 'step', or use 'wus'"
        )


def machine(config: TrainConfig) -> None:
    """Check what depends on the machine.

    Raises:
        ConfigError: as :func:`values`.
        MissingExtra: a package is not installed.
    """
    if config.cuda_graphs and processes.count() > 1:
        raise ConfigError("cuda_graphs needs a single process: messages are not recorded")
    if config.algo == "measure" and processes.count() > 1:
        raise ConfigError(
            "algo 'measure' needs a single process: each would choose for itself; use 'auto'"
        )
    if config.tensorboard:
        check_tensorboard()
    device = config.torch_device()
    if config.cuda_graphs and device.type != "cuda":
        raise ConfigError(f"cuda_graphs needs a GPU, and the device is {device}")
    if config.cuda_graphs and config.amp == "fp16":
        raise ConfigError("cuda_graphs needs amp 'off' or 'bf16': fp16 waits for the GPU to scale")


def _one_of(name: str, value: Any, choices: Collection[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _number(name: str, value: float, wanted: str, good: Callable[[float], bool]) -> None:
    if not math.isfinite(value) or not good(value):
        raise ConfigError(f"{name} must be {wanted}, got {value}")
