"""Fine-tuning: every epoch skips, so that only biases train, or only the last layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..conversion.selection import Layers
from ..conversion.windows import set_skip, trains_nothing, unwrap

__all__ = ["AlwaysSkip", "last_layer"]


class AlwaysSkip:
    """A :class:`~wus_ext.methods.table.Policy` that skips from the first epoch to the last.

    Args:
        model: what to switch, as for :func:`wus_ext.set_skip`; it skips from here on.
        layers: the layers to switch, as for :func:`wus_ext.set_skip`. Default None: all but
            :func:`last_layer`, which is new where classes are.
        skip_biases: whether biases of these layers stand still, too. Default False.

    Raises:
        ValueError: ``layers`` means none, nothing would train, or there is no last layer.

    >>> model = wus_ext.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    >>> policy = AlwaysSkip(model, skip_biases=True)
    >>> model(torch.randn(3, 4)).sum().backward()
    >>> [name for name, p in model.named_parameters() if p.grad is not None]
    ['2.weight', '2.bias']
    """

    def __init__(
        self, model: nn.Module, *, layers: Layers | None = None, skip_biases: bool = False
    ) -> None:
        self.model, self.layers, self.skip_biases = model, layers, skip_biases
        self._last = last_layer(model) if layers is None else None
        self._switch()

    def _switch(self) -> None:
        set_skip(self.model, True, layers=self.layers, skip_biases=self.skip_biases)
        if self._last is not None:
            set_skip(self.model, False, layers=self._last)
        if trains_nothing(self.model):
            set_skip(self.model, False)
            raise ValueError("layers: nothing trains: leave some layers out")

    @property
    def skipping(self) -> bool:
        """True."""
        return True

    def step(self, accuracy: float) -> bool:
        """True, whatever the accuracy."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Nothing: all of it follows from the arguments."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Switches the model.

        Raises:
            ValueError: ``state_dict`` is of another policy.
        """
        if state_dict:
            raise ValueError(f"state_dict must be empty, got {sorted(state_dict)}")
        self._switch()


def last_layer(model: nn.Module) -> str:
    """The name of the layer that gives a network's scores.

    That is what ``get_classifier()`` returns where the network has it, as timm's do, or else the
    last linear or convolutional layer in the order of ``named_modules``.

    Raises:
        ValueError: there is none.

    >>> last_layer(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    '2'
    """
    root = unwrap(model)
    names = {module: name for name, module in root.named_modules()}
    told = getattr(root, "get_classifier", lambda: None)()
    if names.get(told):
        return names[told]
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    last = [name for module, name in names.items() if name and isinstance(module, kinds)]
    if not last:
        raise ValueError("layers: the model has no last linear layer: name the layers to skip")
    return last[-1]
