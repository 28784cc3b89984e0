"""Weight Update Skipping for the Trainer of Hugging Face Transformers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Unpack

from torch import nn

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "wus_ext.integrations.transformers needs Transformers and Accelerate: "
        "pip install 'wus_ext[integrations]'"
    ) from error

from ..conversion.selection import patterns_of
from ..methods.rules import LR_DROP, SettingsDict
from ._decisions import Conversion, Decisions

__all__ = ["WeightUpdateSkipping"]


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
        lr_drop: see :class:`wus_ext.WUSLR`; None ignores learning rates.
        layers: what skips: a pattern of names or several, as for :class:`wus_ext.WUS`.
        full, norm, algo: as for :func:`wus_ext.convert`; None: its default, or what a model that
            is converted already has. One that is given converts such a model anew.
        **settings: fields of :class:`wus_ext.methods.rules.Settings`, which has their defaults;
            the threshold is in percentage points whatever the unit of the metric.

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
        lr_drop: float | None = LR_DROP,
        layers: str | Sequence[str] | None = None,
        full: str | None = None,
        norm: str | None = None,
        algo: str | None = None,
        **settings: Unpack[SettingsDict],
    ) -> None:
        self.monitor = monitor if monitor.startswith("eval_") else f"eval_{monitor}"
        # They go into the Trainer's checkpoints, which are JSON: patterns, no predicate.
        layers = None if layers is None else patterns_of(layers)
        self._arguments = {
            "percent": percent,
            "lr_drop": lr_drop,
            "layers": layers,
            "full": full,
            "norm": norm,
            "algo": algo,
            **settings,
        }
        self._decisions = Decisions(
            self.monitor, percent=percent, lr_drop=lr_drop, layers=layers, **settings
        )
        self._convert = Conversion(full=full, norm=norm, algo=algo)
        self._training = False
        self._recorded = False
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
            self._convert(model)

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
        self._convert(model)
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
            self._recorded = True
            self._decisions.record(metrics[self.monitor])
        else:  # of another data set, perhaps
            self._seen |= set(metrics)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._seen and not self._recorded:
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
