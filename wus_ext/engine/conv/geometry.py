"""A convolution's numbers, and which of our schemes suit them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor, nn

__all__ = ["Geometry", "Scheme", "schemes", "suits_strided"]


class Scheme(IntEnum):
    """Winograd schemes: how many multiplications an output costs instead of nine."""

    Z2 = 0  # whole maps of at most 2x2 pixels with padding 1: 2.25
    F2 = 2  # F(2x2, 3x3): 4
    F4 = 4  # F(4x4, 3x3): 2.25


@dataclass(frozen=True)
class Geometry:
    """A convolution's numbers."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]

    @classmethod
    def of(cls, conv: nn.Conv2d, input: Tensor) -> Geometry:
        size = tuple(input.shape[2:])
        output = tuple(
            (size[i] + 2 * conv.padding[i] - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1)
            // conv.stride[i]
            + 1
            for i in range(2)
        )
        return cls(conv.stride, conv.padding, conv.dilation, conv.groups, size, output)


def suits_strided(conv: nn.Conv2d, geometry: Geometry, algo: str) -> bool:
    """Whether a layer's convolution is one that wus::strided_forward does, and does faster."""
    if algo == "direct" or geometry.groups != 1 or conv.in_channels < 16 or conv.out_channels < 16:
        return False
    if conv.kernel_size == (1, 1):
        return geometry.padding == (0, 0) and max(geometry.stride) > 1
    return (
        algo != "f2"  # the polyphase transform rounds as F(4x4, 3x3) does
        and conv.kernel_size == (3, 3)
        and geometry.stride == (2, 2)
        and geometry.padding == (1, 1)
        and geometry.dilation == (1, 1)
        and min(geometry.output_size) >= 3
    )


def schemes(conv: nn.Conv2d, geometry: Geometry, algo: str) -> list[Scheme]:
    """Winograd schemes that suit a layer, best first; none where only the direct one does."""
    suits = (
        algo != "direct"
        and conv.kernel_size == (3, 3)
        and geometry.stride == (1, 1)
        and geometry.dilation == (1, 1)
        and geometry.groups == 1
        and geometry.padding in ((0, 0), (1, 1), (2, 2))
        and conv.in_channels >= 8
    )
    if not suits:
        return []
    if geometry.input_size == (2, 2) and geometry.padding == (1, 1):
        return [Scheme.Z2, Scheme.F2]
    if algo == "f2" or min(geometry.output_size) < 4:
        return [Scheme.F2]
    return [Scheme.F4, Scheme.F2]
