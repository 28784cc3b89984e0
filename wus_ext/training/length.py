"""How long a run is: when it stops early, and whether it may become longer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..methods.table import SKIPPING
from .config import TrainConfig
from .errors import ConfigError, RunWarning
from .schedules import factor

__all__ = ["check_length", "final_window", "last_epoch", "stopped_at"]


def stopped_at(history: Sequence[Mapping[str, Any]], patience: int | None) -> int | None:
    """The first epoch after ``patience`` others without a better validation accuracy, if any.

    >>> accuracies = 50.0, 60.0, 60.0, 59.0, 70.0
    >>> stopped_at([{"validation_accuracy": accuracy} for accuracy in accuracies], 2)
    4
    """
    best, since = float("-inf"), 0
    for epoch, record in enumerate(history if patience else (), 1):
        since += 1
        if record["validation_accuracy"] > best:
            best, since = record["validation_accuracy"], 0
        if since == patience:
            return epoch
    return None


def final_window(config: TrainConfig) -> int:
    """How many epochs at the end of a run skip."""
    return config.policy_settings()["final_window"] if config.method in SKIPPING else 0


def last_epoch(config: TrainConfig, history: Sequence[Mapping[str, Any]]) -> int:
    """The epoch that the run ends with, as far as ``history`` tells; what stops early still has
    its final window."""
    stopped = stopped_at(history, config.early_stop)
    return config.epochs if stopped is None else min(config.epochs, stopped + final_window(config))


def check_length(config: TrainConfig, before: TrainConfig, done: int, where: object) -> None:
    """Check that a run that trained ``done`` epochs as ``before`` says may go on as ``config``.

    It may if they would have been the same epochs.

    Args:
        where: the run, for the error.

    Warns:
        RunWarning: some were those of the final window, whose place is at the end.

    Raises:
        ConfigError: it may not.
    """
    if config.epochs == before.epochs:
        return
    change = f"epochs is {before.epochs} there, {config.epochs} here"
    if config.epochs < done:
        raise ConfigError(f"cannot resume {where}: {change}, and {done} are trained already")
    if any(factor(config, epoch) != factor(before, epoch) for epoch in range(done + 1)):
        raise ConfigError(
            f"cannot resume {where}: {change}, and the learning rates of schedule "
            f"{config.schedule!r} depend on it (of 'constant' they do not): start another run "
            f"with --weights {where}"
        )
    if done > before.epochs - final_window(before):
        warnings.warn(
            f"the last epochs of {where} so far skipped weights because they were to end it "
            "(--final-window)",
            RunWarning,
            stacklevel=2,
        )
