"""Weight Update Skipping for the Trainer of Hugging Face Transformers."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "wus_ext.integrations.transformers needs Transformers and Accelerate: "
        "pip install 'wus_ext[integrations]'"
    ) from error

from ..conversion.convert import convert
from ..nn import SkipLayer
from ._decisions import Decisions


class WeightUpdateSkipping(TrainerCallback, ExportableState):
    """Skips weight updates after evaluations whose accuracy went flat.

    Converts the Trainer's model, unless it holds a converted part already, and decides before the
    first step after each evaluation, by :class:`wus_ext.WUSLR`, so that a drop of the learning
    rate reopens weight updates. What the policy calls an epoch is the time between two evaluations
    (``eval_strategy``). The state is saved with the Trainer's checkpoints; to resume with it, give
    ``TrainingArguments`` ``restore_callback_states_from_checkpoint=True``.

    Args:
        monitor: name of an accuracy of ``compute_metrics``, with or without ``eval_``.
        percent: whether it is in percent (0 to 100) or, the default, a fraction (0 to 1).
        threshold, patience, max_window, warmup, min_open: see
            :class:`wus_ext.methods.rules.Settings`; the threshold is in
            percentage points whatever the unit of the metric.
        lr_drop: see :class:`wus_ext.WUSLR`; None ignores learning rates.

    Raises:
        TypeError, ValueError: for settings that the policies refuse; in ``train``, without
            evaluations, for a metric that they lack or that is no accuracy.

    Example:
        >>> from wus_ext.integrations.transformers import WeightUpdateSkipping
        >>> callback = WeightUpdateSkipping("accuracy", threshold=0.5, warmup=3)
        >>> callback.skipping
        False
    """

    def __init__(
        self,
        monitor: str = "accuracy",
        *,
        percent: bool = False,
        threshold: float = 1.0,
        patience: int = 2,
        max_window: int = 3,
        warmup: int = 5,
        min_open: int = 1,
        lr_drop: float | None = 0.5,
    ) -> None:
        self.monitor = monitor if monitor.startswith("eval_") else f"eval_{monitor}"
        self._arguments = {
            "percent": percent,
            "lr_drop": lr_drop,
            "threshold": threshold,
            "patience": patience,
            "max_window": max_window,
            "warmup": warmup,
            "min_open": min_open,
        }
        self._decisions = Decisions(self.monitor, **self._arguments)
        self._training = False
        self._heard = False
        self._seen: set[str] = set()

    @property
    def skipping(self) -> bool:
        """Whether training steps skip weight updates at the moment."""
        return self._decisions.skipping

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None:  # None with model_init
            convert_once(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        if args.eval_strategy == "no":
            raise ValueError(
                "WeightUpdateSkipping decides by evaluations: set eval_strategy='epoch'"
            )
        if state.global_step > 0 and not self._decisions.state_dict():
            warnings.warn(
                "training resumes but WeightUpdateSkipping starts anew: set "
                "restore_callback_states_from_checkpoint=True",
                stacklevel=2,
            )
        convert_once(model)
        self._decisions.start(model, [optimizer])
        self._training = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if not self._training or state.global_step == 0:
            return
        if self.monitor in metrics:
            self._heard = True
            self._decisions.hear(metrics[self.monitor])
        else:  # of another data set, perhaps
            self._seen |= set(metrics)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._seen and not self._heard:
            raise ValueError(
                f"monitor: evaluation gave no {self.monitor!r}; there are {sorted(self._seen)}"
            )
        self._decisions.decide()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = False
        self._decisions.stop()

    def state(self) -> dict[str, Any]:
        return {
            "args": {"monitor": self.monitor, **self._arguments},
            "attributes": {"saved_decisions": self._decisions.state_dict()},
        }

    @property
    def saved_decisions(self) -> dict[str, Any]:
        """Set by the Trainer to resume."""
        return self._decisions.state_dict()

    @saved_decisions.setter
    def saved_decisions(self, state: dict[str, Any]) -> None:
        self._decisions.load_state_dict(state)


def convert_once(model: nn.Module) -> None:
    if not any(isinstance(module, SkipLayer) for module in model.modules()):
        convert(model)
