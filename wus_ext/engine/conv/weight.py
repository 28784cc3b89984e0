"""A weight that a convolution is to run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["Weight"]


class Weight(NamedTuple):
    """A layer's weight, or one with a frozen normalisation folded in.

    Attributes:
        layer: whose it is.
        own: the layer's, detached.
        sources: what it is made from; when one changes, so does what is made of it.
        trains: whether it may change before it is used again.
        folded: makes it; None: it is the layer's own.
    """

    layer: nn.Module
    own: Tensor
    sources: tuple[Tensor, ...]
    trains: bool = False
    folded: Callable[[], Tensor] | None = None

    def make(self) -> Tensor:
        return self.own if self.folded is None else self.folded()
