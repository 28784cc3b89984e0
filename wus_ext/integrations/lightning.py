"""Weight Update Skipping for Lightning's Trainer."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import nn

try:
    import lightning.pytorch as pl
except ImportError:
    try:
        import pytorch_lightning as pl
    except ImportError as error:
        raise ImportError(
            "wus_ext.integrations.lightning needs Lightning: pip install 'wus_ext[integrations]'"
        ) from error

from ..conversion.selection import Layers
from ..methods.rules import LR_DROP, SettingsDict
from ._decisions import Conversion, Decisions

__all__ = ["WeightUpdateSkipping"]


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
        lr_drop: see :class:`wus_ext.WUSLR`; None ignores learning rates.
        layers: what skips, as for :class:`wus_ext.WUS`.
        full, norm, algo: as for :func:`wus_ext.convert`; None: its default, or what a model that
            is converted already has. One that is given converts such a model anew.
        **settings: fields of :class:`wus_ext.methods.rules.Settings`, which has their defaults;
            the threshold is in percentage points whatever the unit of the metric.

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
        lr_drop: float | None = LR_DROP,
        layers: Layers | None = None,
        full: str | None = None,
        norm: str | None = None,
        algo: str | None = None,
        **settings: Unpack[SettingsDict],
    ) -> None:
        super().__init__()
        self.monitor = monitor
        self._convert = Conversion(full=full, norm=norm, algo=algo)
        self._decisions = Decisions(
            monitor, percent=percent, lr_drop=lr_drop, layers=layers, **settings
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
            self._convert(*networks(pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._convert(*networks(pl_module))  # if made by configure_model
        # With its wrapper, which may not see pl_module run: training_step need not call it.
        self._decisions.start(trainer.model, trainer.optimizers)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch > 0:
            self._record(trainer)
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
            self._record(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._decisions.stop()

    def _record(self, trainer: pl.Trainer) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        # A metric that was not logged anew is still the same tensor.
        if value is not None and value is not self._last:
            self._last = value
            self._decisions.record(trainer.strategy.reduce(value.float(), reduce_op="mean"))

    def state_dict(self) -> dict[str, Any]:
        return self._decisions.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._decisions.load_state_dict(state_dict)


def networks(module: pl.LightningModule) -> list[nn.Module]:
    """Each network in a LightningModule and itself, so that either may be called."""
    inside = [child for child in module.children() if next(child.parameters(), None) is not None]
    return [*inside, module]
