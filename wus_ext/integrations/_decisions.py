"""What the callbacks share: WUS where somebody else runs the epochs and steps the schedulers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..conversion.windows import set_skip
from ..methods.policy import WUS, WUSLR
from ..methods.rules import Settings, check_lr_drop


class Decisions:
    """Hears of an accuracy when an epoch ends and decides when the next one begins.

    Between the two, schedulers are stepped and checkpoints saved; the state holds what was heard.

    Args:
        monitor: the metric's name, for messages.
        percent: whether it is in percent (0 to 100) or a fraction (0 to 1).
        lr_drop: as for :class:`wus_ext.WUSLR`; None leaves learning rates alone, as
            :class:`wus_ext.WUS`.
        settings: see :class:`wus_ext.methods.rules.Settings`.

    Raises:
        TypeError, ValueError: for what the policies refuse.
    """

    def __init__(
        self, monitor: str, *, percent: bool, lr_drop: float | None, **settings: Any
    ) -> None:
        Settings(**settings)
        if lr_drop is not None:
            check_lr_drop(lr_drop)
        self.monitor, self.percent = monitor, percent
        self.lr_drop, self.settings = lr_drop, settings
        self.policy: WUS | None = None
        self._rates: SeenRates | None = None
        self._heard: float | None = None
        self._loaded: Mapping[str, Any] = {}

    def start(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Makes the policy, in the state that was loaded or left by the last run."""
        state = self.state_dict()
        if self.lr_drop is None:
            self.policy = WUS(model, **self.settings)
        else:
            self._rates = SeenRates(optimizers)
            self.policy = WUSLR(model, self._rates, lr_drop=self.lr_drop, **self.settings)
        if state:
            self.policy.load_state_dict(state["policy"])
            self._heard = state["heard"]
            if self._rates is not None:
                self._rates.load(state["rates"])

    def hear(self, accuracy: float | torch.Tensor) -> None:
        """Notes the accuracy of the epoch that is ending; the last one heard counts.

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
        self._heard = value if self.percent else 100.0 * value

    def decide(self) -> None:
        """Switches the model for the epoch that begins, if an accuracy was heard since."""
        if self._heard is not None:
            self.policy.step(self._heard)
            self._heard = None

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
            "heard": self._heard,
            "rates": [] if self._rates is None else self._rates.values(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes effect at the next :meth:`start`."""
        self._loaded, self.policy = dict(state), None


class SeenRates:
    """Stands for the scheduler of a :class:`wus_ext.WUSLR`: its step looks at the learning rates.

    The framework steps the real schedulers, some of them many times an epoch.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self.step()

    @property
    def optimizer(self) -> SeenRates:
        return self

    def step(self) -> None:
        self.load([float(group["lr"]) for made in self._optimizers for group in made.param_groups])

    def load(self, rates: Sequence[float]) -> None:
        self.param_groups = [{"lr": rate} for rate in rates]

    def values(self) -> list[float]:
        return [group["lr"] for group in self.param_groups]
