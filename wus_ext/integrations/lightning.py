"""Weight Update Skipping for Lightning's Trainer."""

from __future__ import annotations

import warnings
from typing import Any

import torch

try:
    import lightning.pytorch as pl
except ImportError:
    try:
        import pytorch_lightning as pl
    except ImportError as error:
        raise ImportError(
            "wus_ext.integrations.lightning needs Lightning: pip install 'wus_ext[integrations]'"
        ) from error

from ..conversion.convert import convert
from ..nn import SkipLayer
from ._decisions import Decisions


class WeightUpdateSkipping(pl.Callback):
    """Skips weight updates in the epochs after the monitored accuracy went flat.

    Converts the model when ``fit`` sets up, unless it holds a converted part already; decides at
    the beginning of each epoch by :class:`wus_ext.WUSLR`, so that a drop of the learning rate
    reopens weight updates; logs ``skipping_weight_updates`` (0 or 1) for every epoch. Lightning
    goes on stepping the schedulers. The state is saved and restored with checkpoints.

    Args:
        monitor: an accuracy that is logged once an epoch, in ``validation_step``,
            ``on_validation_epoch_end`` or ``training_step(..., on_epoch=True)``. An epoch without
            a new value does not count.
        percent: whether it is in percent (0 to 100) or, the default, a fraction (0 to 1).
        threshold, patience, max_window, warmup, min_open: see
            :class:`wus_ext.methods.rules.Settings`; the threshold is in
            percentage points whatever the unit of the metric.
        lr_drop: see :class:`wus_ext.WUSLR`; None ignores learning rates.

    Raises:
        TypeError, ValueError: for settings that the policies refuse; in ``fit``, for a metric that
            is never logged or is no accuracy.

    Example:
        >>> from wus_ext.integrations.lightning import WeightUpdateSkipping
        >>> callback = WeightUpdateSkipping("val_acc", threshold=1.0, warmup=5)
        >>> callback.skipping
        False
    """

    def __init__(
        self,
        monitor: str,
        *,
        percent: bool = False,
        threshold: float = 1.0,
        patience: int = 2,
        max_window: int = 3,
        warmup: int = 5,
        min_open: int = 1,
        lr_drop: float | None = 0.5,
    ) -> None:
        super().__init__()
        self.monitor = monitor
        self._decisions = Decisions(
            monitor,
            percent=percent,
            lr_drop=lr_drop,
            threshold=threshold,
            patience=patience,
            max_window=max_window,
            warmup=warmup,
            min_open=min_open,
        )
        self._last: torch.Tensor | None = None
        self._validated = False

    @property
    def skipping(self) -> bool:
        """Whether the epoch under way skips weight updates."""
        return self._decisions.skipping

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            convert_once(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        convert_once(pl_module)  # if made by configure_model
        # With its wrapper, which may not see pl_module run: training_step need not call it.
        self._decisions.start(trainer.model, trainer.optimizers)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch > 0:
            self._hear(trainer)
            if self._last is None and (self._validated or not trainer.enable_validation):
                raise ValueError(
                    f"monitor: no metric {self.monitor!r} was logged; "
                    f"there are {sorted(trainer.callback_metrics)}"
                )
        self._decisions.decide()
        pl_module.log("skipping_weight_updates", float(self.skipping), rank_zero_only=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated = True
            self._hear(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hear(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._decisions.stop()

    def _hear(self, trainer: pl.Trainer) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        # A metric that was not logged anew is still the same tensor.
        if value is not None and value is not self._last:
            self._last = value
            self._decisions.hear(trainer.strategy.reduce(value.float(), reduce_op="mean"))

    def state_dict(self) -> dict[str, Any]:
        return self._decisions.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._decisions.load_state_dict(state_dict)


def convert_once(module: pl.LightningModule) -> None:
    """Converts a LightningModule and each network in it, so that either may be called."""
    if not has_parameters(module) or any(isinstance(m, SkipLayer) for m in module.modules()):
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "convert: ", UserWarning)  # a part may have no bias
        for child in module.children():
            if has_parameters(child):
                convert(child)
    convert(module)


def has_parameters(module: torch.nn.Module) -> bool:
    return next(module.parameters(), None) is not None
