"""Transformed copies of weights: kept for a skip window, within a memory budget, or lent for a use.

Weights stand still for a whole skip window, so what a convolution algorithm makes of them can be
kept. A copy is made again when it is asked for with other sources than it was made from, and all
are dropped when the window ends. What is made of a weight that trains serves one product; it lies
in memory that all layers of a model share.

A weight with ``requires_grad=False`` stands still until somebody writes it, which torch need not
see (``weight.data.mul_()``, as momentum encoders do). So its copies stay from step to step and are
checked: one is made again where the values are not those that it was made of.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
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
    sources: tuple[_Source, ...]
    tensor: Tensor
    values: tuple[int, ...] | None  # checksums of the sources, where they are compared

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        return len(self.sources) == len(sources) and all(
            map(_Source.is_still, self.sources, sources)
        )


class _Workspace(threading.local):
    buffer: Tensor | None = None


class PackedWeights:
    """The transformed copies of one model's weights; a layer's go with the layer.

    Args:
        budget: bytes that all copies may take together; "auto" for what the layers save against
            stock, as told by :meth:`saves`; None for no limit.
    """

    def __init__(self, budget: int | Literal["auto"] | None = None) -> None:
        self.budget = budget
        self._layers: WeakKeyDictionary[nn.Module, dict[Hashable, _Copy]] = WeakKeyDictionary()
        self._savings: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._saved = 0
        self._workspace = _Workspace()
        self._checksums: dict[tuple[int, int], int] = {}

    def begin_step(self) -> None:
        """Weights that require no gradient may have changed since the last step."""
        self._checksums.clear()

    def get(
        self,
        layer: nn.Module,
        name: Hashable,
        sources: tuple[Tensor, ...],
        make: Callable[[], Tensor],
    ) -> Tensor:
        """The copy of this name, made by `make` unless `sources` are what they were.

        It is kept where the weight stands still: in a window, or where it is checked.
        """
        checked = _is_checked(layer)
        if not (checked or getattr(layer, "skip_wgrad", False)):
            return make()
        copies = self._layers.setdefault(layer, {})
        copy = copies.get(name)
        values = self._values(sources) if checked else None
        if copy is None or not copy.is_of(sources) or copy.values != values:
            copies.pop(name, None)
            copy = copies[name] = _Copy(tuple(map(_Source, sources)), make(), values)
        return copy.tensor

    def saves(self, layer: nn.Module, weight: Tensor, nbytes: int) -> None:
        """Notes what a layer's step holds less than stock's of the same kind.

        Args:
            nbytes: less saved for backward; a gradient that stock's step makes comes on top.
        """
        if weight.requires_grad and not getattr(layer, "skip_biases", False):
            nbytes += weight.nbytes
        before = self._savings.get(layer, 0)
        if nbytes != before:
            self._savings[layer] = nbytes
            self._saved += nbytes - before
        if nbytes < before:
            self._make_room()

    def fits(
        self, layer: nn.Module, names: Collection[Hashable], nbytes: Callable[[], int]
    ) -> bool:
        """Whether copies of `nbytes()` together may be made; what `names` say is made again."""
        own = self._layers.get(layer, {})
        if self.budget is None or all(name in own for name in names):
            return True
        limit = self._saved if self.budget == "auto" else self.budget
        replaced = sum(own[name].tensor.nbytes for name in names if name in own)
        return self.nbytes() - replaced + nbytes() <= limit

    def lends(self, nbytes: int) -> bool:
        """Whether :meth:`borrow` may be asked for so many bytes."""
        if self.budget is None or self.budget == "auto":
            return True
        return self.nbytes() + max(0, nbytes - self._lent()) <= self.budget

    def borrow(self, shape: torch.Size) -> Tensor:
        """Float32 memory of this thread's for a product that begins now, until the next call."""
        size, buffer = shape.numel(), self._workspace.buffer
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):
                buffer = self._workspace.buffer = torch.empty(size)
            self._make_room()
        return buffer[:size].view(shape)

    def nbytes(self) -> int:
        """Bytes that the copies take, and this thread's memory for those of one use."""
        copies = [copy for own in list(self._layers.values()) for copy in list(own.values())]
        return sum(copy.tensor.nbytes for copy in copies) + self._lent()

    def drop(self, layers: Iterable[nn.Module] | None = None) -> None:
        """Drops the copies of these layers' weights, or of all, but for those that are checked.

        A graph that still needs one keeps it until its backward has run.
        """
        if not self._layers:
            return
        for layer in list(self._layers) if layers is None else layers:
            own = self._layers.pop(layer, {})
            kept = {name: copy for name, copy in own.items() if copy.values is not None}
            if kept and _is_checked(layer):
                self._layers[layer] = kept

    def give_back(self) -> None:
        """Gives this thread's memory for copies of one use back."""
        self._workspace.buffer = None

    def _make_room(self) -> None:
        """Drops what was kept last, where all together goes over what the layers save."""
        layers = list(self._layers) if self.budget == "auto" else []
        while layers and self.nbytes() > self._saved:
            self._layers.pop(layers.pop(), None)

    def _lent(self) -> int:
        buffer = self._workspace.buffer
        return 0 if buffer is None else buffer.nbytes

    def _values(self, sources: tuple[Tensor, ...]) -> tuple[int, ...]:
        """Checksums of tensors, each computed once a step."""
        values = []
        for source in sources:
            name = (source.data_ptr(), source.nbytes)
            if name not in self._checksums:
                self._checksums[name] = torch.ops.wus.checksum(source.detach())
            values.append(self._checksums[name])
        return tuple(values)


def _is_checked(layer: nn.Module) -> bool:
    """Whether a layer's weight stands still without a window that says so."""
    weight = layer._parameters.get("weight")
    return (
        not getattr(layer, "skip_wgrad", False)
        and weight is not None
        and not weight.requires_grad
        and weight.device.type == "cpu"
    )
