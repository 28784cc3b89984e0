"""Transformed copies of weights: made once a skip window, within a memory budget.

Weights stand still for a whole skip window, so what a convolution algorithm makes of them can be
kept. A copy is made again when the weight's version counter or address says that the weight has
changed, and all are dropped when the window ends, unless full steps use them too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass

from torch import Tensor

from .support import version


@dataclass
class _Copy:
    stamp: tuple | None
    tensor: Tensor
    again: bool  # can be made in its place


class PackedWeights:
    """The transformed copies of one model's weights.

    Args:
        budget: bytes that all copies may take together, or None for no limit.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self._copies: dict[tuple[Hashable, ...], _Copy] = {}

    def get(
        self,
        key: tuple[Hashable, ...],
        sources: tuple[Tensor, ...],
        make: Callable[[], Tensor],
        remake: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The copy named `key`, made by `make` unless `sources` are what they were.

        `remake` makes it in the place of the old one, where no graph may still need that.
        """
        stamp = tuple((source.data_ptr(), version(source)) for source in sources)
        copy = self._copies.pop(key, None)
        if copy is None or copy.stamp != stamp:
            # Two references: the copy's own, and getrefcount's argument.
            reuse = remake and copy is not None and sys.getrefcount(copy.tensor) == 2
            tensor = remake(copy.tensor) if reuse else make()
            copy = _Copy(stamp, tensor, again=remake is not None)
        self._copies[key] = copy
        return copy.tensor

    def fits(self, keys: list[tuple[Hashable, ...]], nbytes: Callable[[], int]) -> bool:
        """Whether copies of `nbytes()` together may be made; what `keys` name is made again."""
        if self.budget is None or all(key in self._copies for key in keys):
            return True
        others = sum(_nbytes(copy) for key, copy in list(self._copies.items()) if key not in keys)
        return others + nbytes() <= self.budget

    def nbytes(self) -> int:
        """Bytes that the copies take."""
        return sum(map(_nbytes, list(self._copies.values())))

    def expire(self, layers: Collection[Hashable] | None = None) -> None:
        """Has what was made of these layers' weights, or of all, made again at its next use.

        The weights may change, and versions do not tell: torch's fused optimizers leave them alone.
        Only what can be made in its place is kept.
        """
        for key, copy in list(self._copies.items()):
            if layers is not None and key[0] not in layers:
                continue
            if copy.again:
                copy.stamp = None
            else:
                self._copies.pop(key, None)  # another thread may have been here

    def drop(self, layers: Collection[Hashable]) -> None:
        """Drops the copies of these layers' weights, whose keys begin with them."""
        for key in [key for key in list(self._copies) if key[0] in layers]:
            self._copies.pop(key, None)

    def clear(self) -> None:
        """Drops every copy; a graph that still needs one keeps it until its backward has run."""
        self._copies.clear()


def _nbytes(copy: _Copy) -> int:
    return copy.tensor.numel() * copy.tensor.element_size()
