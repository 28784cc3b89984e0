"""Which algorithm is fastest for a layer's calls, by trying: ``algo="measure"``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from ..._build import chains
from ..activation import Act
from .algorithm import Algorithm
from .geometry import Geometry
from .weight import Weight

__all__ = ["Call", "Contender", "Measured"]

ROUNDS = 3


class Contender(NamedTuple):
    """An algorithm by its name, and what makes it, or None where the memory budget forbids it."""

    name: str
    make: Callable[[], Algorithm | None]


class Call(NamedTuple):
    """What a choice is made for."""

    geometry: Geometry
    images: int
    trains: bool
    backward: bool

    def __str__(self) -> str:
        g = self.geometry
        pairs = ("kernel", g.kernel_size), ("stride", g.stride), ("padding", g.padding)
        parts = [f"{self.images} x {g.in_channels} x {g.input_size[0]} x {g.input_size[1]}"]
        parts += [f"to {g.out_channels}", f"groups {g.groups}"]
        parts += [f"{name} {a}x{b}" for name, (a, b) in (*pairs, ("dilation", g.dilation))]
        parts += ["weight gradient"] * self.trains + ["input gradient"] * self.backward
        return ", ".join(parts)


class Measured:
    """The fastest algorithm of each kind of call that there was, by name.

    What has been measured stands, so that a run which is given an earlier one's choices computes
    the same.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = dict(names)

    def pick(
        self,
        call: Call,
        contenders: Iterable[Contender],
        weight: Weight,
        forget: Callable[[], object],
    ) -> Algorithm:
        """The fastest of the contenders, of which the last can always be made.

        Args:
            forget: drops what contenders have made of the weight.
        """
        makers = dict(contenders)
        *_, last = makers
        kind = str(call)
        if kind not in self.names:
            made = {name: it for name, make in makers.items() if (it := make()) is not None}
            self.names[kind] = fastest(call, made, weight) if len(made) > 1 else last
            forget()
        make = makers.get(self.names[kind])
        chosen = make and make()
        if chosen is None:
            chosen = makers[last]()
        assert chosen is not None
        return chosen


@torch.no_grad()
def fastest(call: Call, contenders: Mapping[str, Algorithm], weight: Weight) -> str:
    """The one whose passes of this call take the least time; they take turns."""
    g = call.geometry
    input = _image(call.images, g.in_channels, g.input_size)
    grad = _image(call.images, g.out_channels, g.output_size)
    trained = chains.Trained(input, weight.own) if call.trains else None

    def run(contender: Algorithm) -> float:
        start = time.perf_counter()
        contender.forward(input, None, Act.NONE)
        if call.backward or trained is not None:
            contender.backward(grad, None, Act.NONE, call.backward, False, trained)
        return time.perf_counter() - start

    for contender in contenders.values():
        run(contender)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            seconds[name].append(run(contender))
    return min(seconds, key=lambda name: median(seconds[name]))


def _image(count: int, channels: int, size: tuple[int, int]) -> Tensor:
    """Without random numbers, which the step would miss, and without zeros."""
    image = torch.empty((count, channels, *size), memory_format=torch.channels_last)
    return image.fill_(0.5)
