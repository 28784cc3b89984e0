"""A convolution's numbers, and which of our schemes suit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import nn

__all__ = ["Geometry", "Scheme", "schemes", "suits_depthwise", "suits_pointwise", "suits_strided"]


class Scheme(IntEnum):
    """Winograd schemes: how many multiplications an output costs instead of nine."""

    Z2 = 0  # whole maps of at most 2x2 pixels with padding 1: 2.25
    F2 = 2  # F(2x2, 3x3): 4
    F4 = 4  # F(4x4, 3x3): 2.25


@dataclass(frozen=True)
class Geometry:
    """A convolution's numbers."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]

    @classmethod
    def of(cls, conv: nn.Conv2d, weight: Sequence[int], input: Sequence[int]) -> Geometry:
        """Of a layer's call.

        Args:
            weight: shape [K, C / groups, R, S].
            input: shape [N, C, H, W].
        """
        assert not isinstance(conv.padding, str)
        kernel, size = _pair(weight[2:]), _pair(input[2:])
        stride, padding, dilation = _pair(conv.stride), _pair(conv.padding), _pair(conv.dilation)
        height, width = (
            (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i in range(2)
        )
        return cls(
            input[1],
            weight[0],
            kernel,
            stride,
            padding,
            dilation,
            conv.groups,
            size,
            (height, width),
        )


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    height, width = numbers
    return height, width


def suits_strided(geometry: Geometry, algo: str) -> bool:
    """Whether a layer's convolution is one that wus::strided_forward does, and does faster."""
    g = geometry
    if algo == "direct" or g.groups != 1 or min(g.in_channels, g.out_channels) < 16:
        return False
    if g.kernel_size == (1, 1):
        return g.padding == (0, 0) and max(g.stride) > 1
    return (
        algo != "f2"  # the polyphase transform rounds as F(4x4, 3x3) does
        and g.kernel_size == (3, 3)
        and g.stride == (2, 2)
        and g.padding == (1, 1)
        and g.dilation == (1, 1)
        and min(g.output_size) >= 3
        and (algo != "auto" or _filled(g.output_size) >= 0.9)
    )


def _filled(size: tuple[int, int]) -> float:
    """The part of 4x4 tiles over a map that lies on it: what else they compute is for nothing."""
    height, width = size
    return height * width / (-(-height // 4) * 4 * (-(-width // 4) * 4))


def suits_pointwise(geometry: Geometry, algo: str) -> bool:
    """Whether a layer's convolution is one that wus::pointwise_forward does."""
    g = geometry
    return (
        algo != "direct"
        and g.groups == 1
        and g.kernel_size == (1, 1)
        and g.stride == (1, 1)
        and g.padding == (0, 0)
        and min(g.in_channels, g.out_channels) >= 8
    )


def suits_depthwise(geometry: Geometry, algo: str) -> bool:
    """Whether a layer's convolution is one that wus::depthwise_forward does."""
    g = geometry
    return (
        algo != "direct"
        and 1 < g.groups == g.in_channels == g.out_channels
        and g.kernel_size in ((3, 3), (5, 5))
        and g.stride in ((1, 1), (2, 2))
        and g.dilation == (1, 1)
        and max(g.padding) < g.kernel_size[0]
    )


def schemes(geometry: Geometry, algo: str) -> list[Scheme]:
    """Winograd schemes that suit a layer, best first; none where only the direct one does."""
    g = geometry
    suits = (
        algo != "direct"
        and g.kernel_size == (3, 3)
        and g.stride == (1, 1)
        and g.dilation == (1, 1)
        and g.groups == 1
        and g.padding in ((0, 0), (1, 1), (2, 2))
        and g.in_channels >= 8
    )
    if not suits:
        return []
    if g.input_size == (2, 2) and g.padding == (1, 1):
        return [Scheme.Z2, Scheme.F2]
    if algo == "f2" or min(g.output_size) < 4:
        return [Scheme.F2]
    return [Scheme.F4, Scheme.F2]
