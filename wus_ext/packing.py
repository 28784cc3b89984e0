"""Transformed copies of frozen weights: made once a window, within a memory budget.

Weights stand still for a whole skip window, so what a convolution algorithm makes of them can be
kept. A copy is made again when the weight's version counter or address says that the weight has
changed, and all are dropped when the window ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class _Copy:
    stamp: tuple
    tensor: Tensor


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
    ) -> Tensor:
        """The copy named `key`, made by `make` unless `sources` are what they were."""
        stamp = tuple((source.data_ptr(), source._version) for source in sources)
        copy = self._copies.get(key)
        if copy is None or copy.stamp != stamp:
            self._copies.pop(key, None)
            copy = self._copies[key] = _Copy(stamp, make())
        return copy.tensor

    def fits(self, keys: list[tuple[Hashable, ...]], nbytes: Callable[[], int]) -> bool:
        """Whether copies of `nbytes()` together may be made; what `keys` name is made again."""
        if self.budget is None:
            return True
        others = sum(_nbytes(copy) for key, copy in self._copies.items() if key not in keys)
        return others + nbytes() <= self.budget

    def nbytes(self) -> int:
        """Bytes that the copies take."""
        return sum(map(_nbytes, self._copies.values()))

    def drop(self, layers: Collection[Hashable]) -> None:
        """Drops the copies of these layers' weights, whose keys begin with them."""
        for key in [key for key in self._copies if key[0] in layers]:
            del self._copies[key]

    def clear(self) -> None:
        """Drops every copy; a graph that still needs one keeps it until its backward has run."""
        self._copies.clear()


def _nbytes(copy: _Copy) -> int:
    return copy.tensor.numel() * copy.tensor.element_size()
