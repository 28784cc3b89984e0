"""The rules of Weight Update Skipping: when a skip window opens and closes.

Accuracy improves in bursts, with stretches of minuscule variation between them. Weight Update
Skipping (Safayenikoo and Akturk, "Weight Update Skipping: Reducing Training Time for Artificial
Neural Networks", arXiv 2012.02792, IEEE JETCAS 2021) stops updating the weights during such
stretches and keeps training the biases. The rules below are **our reading** of the paper's
abstract, not a transcription of its algorithm.

All lengths are in epochs, all accuracies in percent (0 to 100): of the training set, which costs
nothing extra, or of held-out data.

* The *variation* is the largest minus the smallest accuracy of the last ``patience + 1`` epochs,
  whether their weights trained or not. The accuracy is *flat* when there are that many and the
  variation is strictly below ``threshold`` percentage points.
* A *skip window* opens when the accuracy is flat, at least ``warmup`` epochs have passed and the
  weights have trained for at least ``min_open`` epochs since the last window (or the start).
* It closes when the accuracy is no longer flat, and in any case after ``max_window`` epochs.
* With a learning-rate scheduler (:class:`wus_ext.WUSLR`), a jump of the learning rate closes the
  window, and none opens in the epoch after a jump.
* The last ``final_window`` epochs of a run of ``total_epochs`` are a window, whatever else holds.

:func:`decide` is exactly that, as a pure function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple, TypedDict

__all__ = ["LR_DROP", "Phase", "Settings", "SettingsDict", "decide"]

#: Default of the ratio of learning rates that counts as a jump.
LR_DROP = 0.5

#: The least that each number of epochs may be.
_LENGTHS = {
    "patience": 1,
    "max_window": 1,
    "warmup": 0,
    "min_open": 1,
    "final_window": 0,
    "total_epochs": 1,
}


class SettingsDict(TypedDict, total=False):
    """The fields of :class:`Settings`, for signatures that pass them on."""

    threshold: float
    patience: int
    max_window: int
    warmup: int
    min_open: int
    final_window: int
    total_epochs: int | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """When skip windows open and close; see the module's text for the rules.

    Args:
        threshold: variation in percentage points below which the accuracy is flat, in [0, 100].
            0 never opens a window.
        patience: the variation is that of the last ``patience + 1`` epochs, at least 1.
        max_window: longest skip window in epochs, at least 1.
        warmup: epochs before the first window may open, at least 0. Their accuracies count
            towards the variation, so no window opens before epoch
            ``max(warmup, patience + 1, min_open)`` has ended.
        min_open: epochs that weights train between two windows, at least 1.
        final_window: so many epochs at the end of the run skip, whatever the accuracy; needs
            ``total_epochs``.
        total_epochs: length of the run, at least 1; None: not known.

    Raises:
        TypeError: a length is not an integer or the threshold is not a number.
        ValueError: a value is out of its range.
    """

    threshold: float = 1.0
    patience: int = 2
    max_window: int = 3
    warmup: int = 5
    min_open: int = 1
    final_window: int = 0
    total_epochs: int | None = None

    def __post_init__(self) -> None:
        # Plain Python numbers, so that a state dict loads with torch.load(weights_only=True).
        threshold = real("threshold", self.threshold)
        if not 0 <= threshold <= 100:
            raise ValueError(f"threshold must be in [0, 100] percentage points, got {threshold}")
        object.__setattr__(self, "threshold", threshold)
        for name, least in _LENGTHS.items():
            value = getattr(self, name)
            if name == "total_epochs" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name} must be an integer number of epochs, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
            object.__setattr__(self, name, int(value))
        if self.final_window and self.total_epochs is None:
            raise ValueError("final_window needs total_epochs, the length of the run")

    def ends(self, epochs: int) -> bool:
        """Whether the epoch after so many lies in the run's final window."""
        total = self.total_epochs
        return total is not None and total - self.final_window <= epochs < total


class Phase(NamedTuple):
    """What training is doing: skipping weight updates or not, and for how many epochs already."""

    skipping: bool = False
    epochs: int = 0


def decide(
    history: Sequence[float], phase: Phase, settings: Settings, *, lr_jumped: bool = False
) -> bool:
    """Say whether the next epoch skips weight updates. Pure: equal arguments, equal answer.

    Args:
        history: accuracy in percent of every epoch so far, the latest last.
        phase: the phase that the latest epoch belonged to, that epoch included.
        settings: when windows open and close.
        lr_jumped: the learning rate of the next epoch has jumped, so that weights must train.

    >>> settings = Settings(threshold=1.0, patience=1, warmup=0)
    >>> decide([60.0, 60.4], Phase(skipping=False, epochs=2), settings)
    True
    >>> decide([60.0, 61.4], Phase(skipping=False, epochs=2), settings)
    False
    """
    if settings.ends(len(history)):
        return True
    recent = history[-(settings.patience + 1) :]
    flat = len(recent) > settings.patience and max(recent) - min(recent) < settings.threshold
    if lr_jumped or not flat:
        return False
    if phase.skipping:
        return phase.epochs < settings.max_window
    return len(history) >= settings.warmup and phase.epochs >= settings.min_open


def check_lr_drop(lr_drop: Any) -> float:
    """``lr_drop`` as a float; TypeError or ValueError if it is not strictly between 0 and 1."""
    value = real("lr_drop", lr_drop)
    if not 0 < value < 1:
        raise ValueError(f"lr_drop must be between 0 and 1 (exclusive), got {lr_drop}")
    return value


def real(name: str, value: Any) -> float:
    """``value`` as a finite float; TypeError or ValueError, naming it ``name``, if it is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
