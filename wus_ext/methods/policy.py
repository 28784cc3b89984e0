"""Weight Update Skipping: WUS and WUS+LR remember a run's accuracies and switch its model.

:mod:`wus_ext.methods.rules` says when.

When it does not pay off:

* The accuracy rises all the time, or the run is a few epochs long: hardly a window opens.
* The accuracy is noisier than ``threshold``. On ``n`` samples its standard error is
  ``100 * sqrt(p * (1 - p) / n)`` points, for ``n = 1000`` and ``p = 0.5`` already 1.6.
* The network has not begun to learn and sits at chance, which is flat, too. Use a longer
  ``warmup``.
* Loading data or evaluating takes most of an epoch: a skip step makes only the training step
  cheaper.
* The network has neither biases nor normalisation layers: nothing would train in a window, and
  opening one is an error. A shorter run costs less and reaches the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Unpack

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..conversion.selection import Layers, patterns_of
from ..conversion.windows import set_skip, trains_nothing
from ..distributed import processes
from .rules import LR_DROP, Phase, Settings, SettingsDict, check_lr_drop, decide, real

__all__ = ["WUS", "WUSLR", "Phase", "Settings", "decide"]


class WUS:
    """Skip weight updates while the accuracy is flat.

    Call :meth:`step` once after each epoch. The policy starts with weights training: it turns
    skipping off in ``model``.

    Args:
        model: the model to switch, anything that :func:`wus_ext.set_skip` takes.
        layers: the layers to switch, as :func:`wus_ext.set_skip` takes them; all others are left
            as they are. Default None: every layer.
        **settings: fields of :class:`wus_ext.methods.rules.Settings`, which has their defaults.

    Raises:
        TypeError: a setting is not of its type.
        ValueError: a setting is out of its range, ``model`` has no layer that can skip, or
            ``layers`` means none.

    In several processes each passes its own accuracy, and all decide by the mean: :meth:`step`
    must be called in every process.

    >>> import torch, wus_ext
    >>> model = wus_ext.convert(torch.nn.Linear(4, 2))
    >>> policy = wus_ext.WUS(model, threshold=1.0, patience=2, max_window=3, warmup=0)
    >>> [policy.step(accuracy) for accuracy in (50.0, 60.0, 60.2, 60.4, 60.3, 60.5, 60.6)]
    [False, False, False, True, True, True, False]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers | None = None,
        **settings: Unpack[SettingsDict],
    ) -> None:
        self.settings = Settings(**settings)
        self.model = model
        self.layers: Layers | None = layers
        if layers is not None and not callable(layers):
            self.layers = patterns_of(layers)
            if not self.layers:
                raise ValueError("layers: no pattern; None means every layer")
        self._history: list[float] = []
        self._phase = Phase()
        self._finishing = False
        self._switch(False)

    @property
    def skipping(self) -> bool:
        """Whether the next epoch (or the one under way) skips weight updates."""
        return self._phase.skipping

    @property
    def history(self) -> list[float]:
        """Accuracy in percent of every epoch so far (a copy)."""
        return list(self._history)

    def step(self, accuracy: float | torch.Tensor) -> bool:
        """Record the accuracy of the epoch that just ended and switch the model for the next.

        Args:
            accuracy: in percent, in [0, 100], of the training set or of held-out data: a number or
                a 0-dim tensor. Of several processes each gives its own; the mean over them counts.

        Returns:
            Whether the next epoch skips weight updates.

        Raises:
            TypeError: ``accuracy`` is not a number.
            ValueError: ``accuracy`` is NaN or outside [0, 100], or a window would open in which
                nothing trains. The policy is unchanged then, and weights train.
        """
        return self._advance(self._mean(accuracy, _percent))

    def finish(self) -> None:
        """Open the run's final window now: every epoch from here on skips weight updates.

        For runs whose length is not known beforehand, early stopping for one; otherwise the
        settings ``final_window`` and ``total_epochs`` do it.

        Raises:
            ValueError: nothing would train in the window.

        >>> policy = wus_ext.WUS(wus_ext.convert(torch.nn.Linear(4, 2)))
        >>> policy.finish()
        >>> policy.skipping, policy.step(50.0), policy.step(60.0)
        (True, True, True)
        """
        self._switch(True)
        if not self.skipping:
            self._phase = Phase(skipping=True)
        self._finishing = True

    def _mean(self, value: Any, check: Callable[[Any], float]) -> float:
        wrapped = isinstance(self.model, nn.parallel.DistributedDataParallel)
        group = self.model.process_group if wrapped else None
        return processes.mean(value, check, group)

    def _advance(self, accuracy: float, *, lr_jumped: bool = False) -> bool:
        history = [*self._history, accuracy]
        phase = Phase(self.skipping, self._phase.epochs + 1)
        skip = self._finishing or decide(history, phase, self.settings, lr_jumped=lr_jumped)
        if skip and not phase.skipping and max(history) <= 1:
            warnings.warn(
                f"no accuracy so far exceeds {max(history):g} percent; "
                "accuracies are percentages (0 to 100), not fractions",
                stacklevel=3,
            )
        self._switch(skip)
        self._history = history
        self._phase = phase if skip == phase.skipping else Phase(skip)
        return skip

    def _switch(self, skip: bool) -> None:
        set_skip(self.model, skip, layers=self.layers)
        if skip and trains_nothing(self.model):
            set_skip(self.model, False, layers=self.layers)
            raise ValueError(
                "model: nothing trains in a skip window, for it has no bias that trains; use "
                "convert(model, skip_gamma=False) if it has normalisation layers, layers= to skip "
                "some layers only, or no policy"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return settings, history and phase as plain data (loads with ``weights_only=True``).

        Not ``layers``: build the policy that loads it with the same.
        """
        return {
            "settings": self._settings(),
            "history": self.history,
            "skipping": self._phase.skipping,
            "epochs": self._phase.epochs,
            "finishing": self._finishing,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where the run that saved ``state_dict`` stopped; switches the model, too.

        Raises:
            TypeError: ``state_dict`` is not a mapping.
            ValueError: keys are missing or unknown, values are impossible, or the state was saved
                under other settings, with which the run would have decided differently. The
                policy is unchanged then.
        """
        history, phase = self._check_state(state_dict)
        self._switch(phase.skipping)
        self._history, self._phase = history, phase
        self._finishing = state_dict["finishing"]

    def _check_state(self, state: Mapping[str, Any]) -> tuple[list[float], Phase]:
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state).__name__}")
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"state_dict must have the keys {sorted(self.state_dict())}, got {sorted(state)}: "
                f"was it saved by a {type(self).__name__}?"
            )
        saved, own = state["settings"], self._settings()
        # A run may get longer or shorter: nothing that was decided so far depends on it.
        if not isinstance(saved, Mapping) or {**saved, "total_epochs": own["total_epochs"]} != own:
            raise ValueError(
                f"state_dict was saved with settings {saved}, this policy has {own}: "
                "build the policy with the saved settings"
            )
        history = [_percent(accuracy) for accuracy in state["history"]]
        phase = Phase(state["skipping"], state["epochs"])
        if not isinstance(phase.skipping, bool) or phase.epochs not in range(len(history) + 1):
            raise ValueError(
                f"state_dict must have a bool 'skipping' and 'epochs' from 0 to {len(history)} "
                f"(the length of its history), got {phase.skipping!r} and {phase.epochs!r}"
            )
        if not isinstance(state["finishing"], bool):
            raise ValueError(f"state_dict must have a bool 'finishing', got {state['finishing']!r}")
        return history, phase

    def _settings(self) -> dict[str, float | None]:
        return asdict(self.settings)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self._settings().items())
        return f"{type(self).__name__}({settings})"


class WUSLR(WUS):
    """:class:`WUS` together with a learning-rate scheduler, which :meth:`step` steps, too.

    The learning rate *jumps* when, in any parameter group, the coming epoch's is at most
    ``lr_drop`` times the one that weights last trained with, or at least ``1 / lr_drop`` times: in
    a window that of the epoch before it opened, otherwise that of the epoch just ended. Weights
    train in the epoch after a jump. So a step decay or a warm restart reopens weight updates at
    once, and a slow decay, as in cosine annealing, only once it has added up within a window.

    Args:
        model: the model to switch, anything that :func:`wus_ext.set_skip` takes.
        scheduler: any scheduler of ``torch.optim.lr_scheduler``.
        layers: the layers to switch, as for :class:`WUS`.
        lr_drop: largest ratio of learning rates that counts as a jump, in (0, 1). Default 0.5.
        step_scheduler: whether :meth:`step` steps the scheduler, once an epoch; the caller must
            not step it as well. With False the caller does, after each batch or before
            :meth:`step`, and the policy looks at the rates that the optimizer has by then; an
            epoch counts with the rate that it began with. Default True.
        **settings: fields of :class:`wus_ext.methods.rules.Settings`, which has their defaults.

    Raises:
        TypeError: ``scheduler`` is not a scheduler, or a setting is not of its type.
        ValueError: a setting is out of its range, ``model`` has no layer that can skip, or
            ``layers`` means none.

    :meth:`state_dict` does **not** hold the scheduler's state. Save and load optimizer, scheduler
    and policy each by its own ``state_dict``, in any order.

    >>> import torch, wus_ext
    >>> model = wus_ext.convert(torch.nn.Linear(4, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
    >>> policy = wus_ext.WUSLR(model, scheduler, patience=1, warmup=0)
    >>> decisions = []
    >>> for accuracy in (60.0, 60.1, 60.2, 60.3, 60.4):
    ...     optimizer.step()  # stands for an epoch
    ...     decisions.append(policy.step(accuracy))
    >>> decisions  # the learning rate drops after the third epoch
    [False, True, False, True, True]

    A scheduler that is stepped after each batch:

    >>> scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    >>> policy = wus_ext.WUSLR(model, scheduler, step_scheduler=False, patience=1, warmup=0)
    >>> for epoch in range(2):
    ...     for batch in range(10):
    ...         optimizer.step()
    ...         scheduler.step()
    ...     skipping = policy.step(60.0)
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        *,
        layers: Layers | None = None,
        lr_drop: float = LR_DROP,
        step_scheduler: bool = True,
        **settings: Unpack[SettingsDict],
    ) -> None:
        if not callable(getattr(scheduler, "step", None)) or not hasattr(
            getattr(scheduler, "optimizer", None), "param_groups"
        ):
            raise TypeError(
                "scheduler must be a learning-rate scheduler with an optimizer, "
                f"got {type(scheduler).__name__}"
            )
        if not isinstance(step_scheduler, bool):
            raise TypeError(f"step_scheduler must be a bool, got {step_scheduler!r}")
        self.lr_drop = check_lr_drop(lr_drop)
        self.scheduler, self.step_scheduler = scheduler, step_scheduler
        super().__init__(model, layers=layers, **settings)
        #: What the epoch under way began with, and the last epoch that trained weights.
        self._rates = self._current_rates()
        self._trained_rates: list[float] = []

    def step(
        self, accuracy: float | torch.Tensor, metric: float | torch.Tensor | None = None
    ) -> bool:
        """Step the scheduler, then do as :meth:`WUS.step`.

        Args:
            accuracy: as for :meth:`WUS.step`.
            metric: what a ``ReduceLROnPlateau`` watches, by default the accuracy (which needs
                ``mode="max"``; a warning says so). Other schedulers take none.

        Returns:
            Whether the next epoch skips weight updates.

        Raises:
            TypeError: ``accuracy`` is not a number.
            ValueError: ``accuracy`` is NaN or outside [0, 100], or ``metric`` is given to a
                scheduler that takes none or that the caller steps. Scheduler and policy are
                unchanged then. Or a window would open in which nothing trains.
        """
        percent = self._mean(accuracy, _percent)
        if metric is not None and processes.count() > 1:
            metric = self._mean(metric, float)
        # Others may set the rates of an epoch before it begins, a warm-up or load_state_dict.
        began = self._current_rates() if self.step_scheduler else self._rates
        trained = self._trained_rates if self.skipping else began
        self._step_scheduler(percent, metric)
        rates = self._current_rates()
        # Not strict: groups may have been added to the optimizer since.
        jumped = any(self._jumps(*pair) for pair in zip(trained, rates, strict=False))
        self._rates, self._trained_rates = rates, trained
        return self._advance(percent, lr_jumped=jumped)

    def _jumps(self, old: float, new: float) -> bool:
        # The slack is for rounding: halving by gamma=0.5 is a drop to 0.5, whatever the dtype.
        ratio = self.lr_drop * (1 + 1e-6)
        return old != new and min(old, new) <= ratio * max(old, new)

    def _step_scheduler(self, accuracy: float, metric: float | torch.Tensor | None) -> None:
        if not self.step_scheduler:
            if metric is not None:
                raise ValueError("metric is for scheduler.step, with step_scheduler=False yours")
            return
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            if metric is not None:
                raise ValueError(
                    f"metric is for ReduceLROnPlateau; {type(self.scheduler).__name__} takes none"
                )
            self.scheduler.step()
            return
        if metric is None and self.scheduler.mode != "max":
            warnings.warn(
                "ReduceLROnPlateau is given the accuracy but its mode is "
                f"{self.scheduler.mode!r}: use mode='max', or pass metric=",
                stacklevel=3,
            )
        self.scheduler.step(accuracy if metric is None else metric)

    def _current_rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.scheduler.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return settings, history, phase and reference learning rates as plain data.

        Not the scheduler's state: save that with ``scheduler.state_dict()``.
        """
        return {
            **super().state_dict(),
            "rates": list(self._rates),
            "trained_rates": list(self._trained_rates),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As :meth:`WUS.load_state_dict`; the scheduler and the optimizer load their own."""
        self._check_state(state_dict)
        rates, trained = (
            [real(name, rate) for rate in state_dict[name]] for name in ("rates", "trained_rates")
        )
        super().load_state_dict(state_dict)
        self._rates, self._trained_rates = rates, trained

    def _settings(self) -> dict[str, float | None]:
        return {**super()._settings(), "lr_drop": self.lr_drop}


def _percent(accuracy: Any) -> float:
    if isinstance(accuracy, torch.Tensor):
        if accuracy.dim() != 0:
            raise TypeError(f"accuracy must be a 0-dim tensor, got shape {tuple(accuracy.shape)}")
        accuracy = accuracy.item()
    value = real("accuracy", accuracy)
    if not 0 <= value <= 100:
        raise ValueError(f"accuracy must be in percent, in [0, 100], got {value}")
    return value
