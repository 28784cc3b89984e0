"""What the callbacks share: WUS where somebody else runs the epochs and steps the schedulers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from ..conversion.convert import convert
from ..conversion.selection import Layers
from ..conversion.windows import set_skip
from ..engine.options import SkipOptions
from ..methods.policy import WUS, WUSLR
from ..methods.rules import Settings, SettingsDict, check_lr_drop
from ..nn import SkipLayer


class Decisions:
    """Records an accuracy when an epoch ends and decides when the next one begins.

    Between the two, schedulers are stepped and checkpoints saved; the state holds the record.

    Args:
        monitor: the metric's name, for messages.
        percent: whether it is in percent (0 to 100) or a fraction (0 to 1).
        lr_drop: as for :class:`wus_ext.WUSLR`; None leaves learning rates alone, as
            :class:`wus_ext.WUS`.
        layers: what skips, as for :class:`wus_ext.WUS`.
        settings: see :class:`wus_ext.methods.rules.Settings`.

    Raises:
        TypeError, ValueError: for what the policies refuse.
    """

    def __init__(
        self,
        monitor: str,
        *,
        percent: bool,
        lr_drop: float | None,
        layers: Layers | None,
        **settings: Unpack[SettingsDict],
    ) -> None:
        Settings(**settings)
        if lr_drop is not None:
            check_lr_drop(lr_drop)
        self.monitor, self.percent = monitor, percent
        self.lr_drop = lr_drop
        self._layers, self._settings = layers, settings
        self.policy: WUS | None = None
        self._recorded: float | None = None
        self._loaded: Mapping[str, Any] = {}

    def start(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Makes the policy, in the state that was loaded or left by the last run."""
        state = self.state_dict()
        if self.lr_drop is None:
            self.policy = WUS(model, layers=self._layers, **self._settings)
        else:
            self.policy = WUSLR(
                model,
                Rates(optimizers),
                layers=self._layers,
                lr_drop=self.lr_drop,
                step_scheduler=False,
                **self._settings,
            )
        if state:
            self.policy.load_state_dict(state["policy"])
            self._recorded = state["recorded"]

    def record(self, accuracy: float | torch.Tensor) -> None:
        """Notes the accuracy of the epoch that is ending; the last one counts.

        Raises:
            ValueError: if it is no accuracy in the unit that was announced.
        """
        value, most = float(accuracy), 100.0 if self.percent else 1.0
        if not 0.0 <= value <= most:
            unit = "in percent, 0 to 100" if self.percent else "a fraction, 0 to 1"
            other = "False for a fraction" if self.percent else "True for percentages"
            raise ValueError(
                f"{self.monitor}: got {value:g}, expected an accuracy, {unit} "
                f"(percent={self.percent}; {other})"
            )
        self._recorded = value if self.percent else 100.0 * value

    def decide(self) -> None:
        """Switches the model for the epoch that begins, if an accuracy was recorded since."""
        if self.policy is not None and self._recorded is not None:
            self.policy.step(self._recorded)
            self._recorded = None

    def stop(self) -> None:
        """Leaves the model training all of its parameters."""
        if self.policy is not None:
            set_skip(self.policy.model, False)

    @property
    def skipping(self) -> bool:
        return self.policy is not None and self.policy.skipping

    def state_dict(self) -> dict[str, Any]:
        """Plain data; empty before the first start."""
        if self.policy is None:
            return dict(self._loaded)
        return {
            "policy": self.policy.state_dict(),
            "recorded": self._recorded,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes effect at the next :meth:`start`."""
        self._loaded, self.policy = dict(state), None


class Rates:
    """Stands for the scheduler of a :class:`wus_ext.WUSLR`: the learning rates of optimizers.

    The framework steps the real schedulers, some of them many times an epoch.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    @property
    def optimizer(self) -> Rates:
        return self

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """The framework's."""


class ConversionDict(TypedDict, total=False):
    """The settings of :func:`wus_ext.convert` that the callbacks take."""

    full: str
    norm: str
    algo: str


class Conversion:
    """Converts a model once, with the settings that were given.

    Args:
        full, norm, algo: as for :func:`wus_ext.convert`; None: its default, or what a model that
            is converted already has.

    Raises:
        ValueError: for what ``convert`` refuses.
    """

    def __init__(self, *, full: str | None, norm: str | None, algo: str | None) -> None:
        self.settings: ConversionDict = {}
        if full is not None:
            self.settings["full"] = full
        if norm is not None:
            self.settings["norm"] = norm
        if algo is not None:
            self.settings["algo"] = algo
        SkipOptions(**self.settings)
        self._done = False

    def __call__(self, *parts: nn.Module) -> None:
        """Converts each part, the last of which holds the others."""
        root = parts[-1]
        converted = any(isinstance(module, SkipLayer) for module in root.modules())
        if converted and (self._done or not self.settings):
            return
        if next(root.parameters(), None) is None:  # made later
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "convert: ", UserWarning)  # a part may have no bias
            for part in parts[:-1]:
                convert(part, **self.settings)
        convert(root, **self.settings)
        self._done = True
