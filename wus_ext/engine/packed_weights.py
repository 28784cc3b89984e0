"""Transformed copies of weights: made once a skip window, within a memory budget.

Weights stand still for a whole skip window, so what a convolution algorithm makes of them can be
kept. A copy is made again when it is asked for with other sources than it was made from, and all
are dropped when the window ends, unless full steps use them too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .support import version


class _Source:
    """A tensor as it was. Its memory is held, so that no other tensor comes to lie there."""

    def __init__(self, tensor: Tensor) -> None:
        self._memory = tensor.detach()
        self._version = version(tensor)

    def is_still(self, tensor: Tensor) -> bool:
        memory = self._memory
        return (
            memory.data_ptr() == tensor.data_ptr()
            and self._version == version(tensor)
            and memory.shape == tensor.shape
            and memory.stride() == tensor.stride()
        )


@dataclass
class _Copy:
    sources: tuple[_Source, ...] | None  # None: to be made again
    tensor: Tensor
    again: bool  # can be made in its place

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        return (
            self.sources is not None
            and len(self.sources) == len(sources)
            and all(map(_Source.is_still, self.sources, sources))
        )


class PackedWeights:
    """The transformed copies of one model's weights; a layer's go with the layer.

    Args:
        budget: bytes that all copies may take together, or None for no limit.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self._layers: WeakKeyDictionary[nn.Module, dict[Hashable, _Copy]] = WeakKeyDictionary()

    def get(
        self,
        layer: nn.Module,
        name: Hashable,
        sources: tuple[Tensor, ...],
        make: Callable[[], Tensor],
        remake: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The copy of this name, made by `make` unless `sources` are what they were.

        `remake` makes it in the place of the old one, where no graph may still need that.
        """
        copies = self._layers.setdefault(layer, {})
        copy = copies.pop(name, None)
        if copy is None or not copy.is_of(sources):
            # Two references: the copy's own, and getrefcount's argument.
            reuse = remake and copy is not None and sys.getrefcount(copy.tensor) == 2
            tensor = remake(copy.tensor) if reuse else make()
            copy = _Copy(tuple(map(_Source, sources)), tensor, again=remake is not None)
        copies[name] = copy
        return copy.tensor

    def fits(
        self, layer: nn.Module, names: Collection[Hashable], nbytes: Callable[[], int]
    ) -> bool:
        """Whether copies of `nbytes()` together may be made; what `names` say is made again."""
        own = self._layers.get(layer, {})
        if self.budget is None or all(name in own for name in names):
            return True
        replaced = sum(_nbytes(own[name]) for name in names if name in own)
        return self.nbytes() - replaced + nbytes() <= self.budget

    def nbytes(self) -> int:
        """Bytes that the copies take."""
        return sum(_nbytes(copy) for copies in self._of(None) for copy in list(copies.values()))

    def expire(self, layers: Iterable[nn.Module] | None = None) -> None:
        """Has what was made of these layers' weights, or of all, made again at its next use.

        The weights may change, and versions do not tell: torch's fused optimizers leave them alone.
        Only what can be made in its place is kept.
        """
        for copies in self._of(layers):
            for name, copy in list(copies.items()):
                if copy.again:
                    copy.sources = None
                else:
                    copies.pop(name, None)  # another thread may have been here

    def drop(self, layers: Iterable[nn.Module]) -> None:
        """Drops the copies of these layers' weights."""
        for layer in layers:
            self._layers.pop(layer, None)

    def clear(self) -> None:
        """Drops every copy; a graph that still needs one keeps it until its backward has run."""
        self._layers.clear()

    def _of(self, layers: Iterable[nn.Module] | None) -> Iterator[dict[Hashable, _Copy]]:
        if layers is None:
            yield from list(self._layers.values())
        else:
            yield from (self._layers[layer] for layer in layers if layer in self._layers)


def _nbytes(copy: _Copy) -> int:
    return copy.tensor.numel() * copy.tensor.element_size()
