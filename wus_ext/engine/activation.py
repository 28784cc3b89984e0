"""What follows a convolution, a linear layer or a normalisation: an activation, a max-pool.

Backward needs one bit an element where an activation's slope has two values only, and the
activation's input where it has more; behind a normalisation that input is computed again from the
normalisation's, which is saved anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

__all__ = ["Act", "Kind", "Pool", "activate", "masked"]

ops = torch.ops.wus


class Kind(IntEnum):
    """Activations, as the operators number them (``csrc/common/activation.h``)."""

    NONE = 0
    RELU = 1
    RELU6 = 2
    LEAKY_RELU = 3
    HARDSIGMOID = 4
    HARDSWISH = 5
    SILU = 6
    SIGMOID = 7
    GELU = 8
    GELU_TANH = 9

    @property
    def bits(self) -> bool:
        """Whether a bit an element is all that backward needs."""
        return Kind.RELU <= self <= Kind.HARDSIGMOID


class Pool(NamedTuple):
    """A square max-pool; one byte an output tells where its maximum was.

    Attributes:
        kernel: 2 to 15.
    """

    kernel: int
    stride: int
    padding: int = 0
    ceil: bool = False


@dataclass(frozen=True)
class Act:
    """An activation, and the max-pool behind it; with a pool the activation is none or ReLU.

    Attributes:
        slope: below zero, of a leaky ReLU.
    """

    kind: Kind = Kind.NONE
    slope: float = 0.0
    pool: Pool | None = None

    NONE: ClassVar[Act]
    RELU: ClassVar[Act]
    RELU_POOL: ClassVar[Act]  # ReLU and a 2x2 max-pool

    @staticmethod
    @lru_cache(maxsize=256)
    def of(kind: int, slope: float, pool: tuple[int, int, int, bool] | None) -> Act:
        """As ``csrc/deferral`` has it."""
        return Act(Kind(kind), slope, None if pool is None else Pool(*pool))

    @property
    def smooth(self) -> bool:
        """Whether backward needs the activation's input."""
        return self.kind != Kind.NONE and not self.kind.bits

    @property
    def function(self) -> tuple[int, float]:
        """The operators' arguments ``act`` and ``slope``."""
        return int(self.kind), self.slope

    @property
    def arguments(self) -> tuple[int, float, list[int]]:
        """The operators' arguments ``act``, ``slope`` and ``pool``."""
        return *self.function, [] if self.pool is None else list(map(int, self.pool))


Act.NONE = Act()
Act.RELU = Act(Kind.RELU)
Act.RELU_POOL = Act(Kind.RELU, pool=Pool(2, 2))


def activate(input: Tensor, act: Act) -> tuple[Tensor, Tensor | None]:
    """act(input) and what backward needs: bits, codes, the input.

    The input may be written over.
    """
    kind, slope, pool = act.arguments
    if pool:
        return ops.relu_max_pool(input, act.kind == Kind.RELU, pool)
    if act.kind == Kind.NONE:
        return input, None
    if not act.smooth:
        return ops.activate_(input, kind, slope)
    output, bits = ops.activate(input, None, kind, slope)
    return output, input if act.smooth else bits


def masked(
    grad: Tensor,
    saved: Tensor | None,
    act: Act,
    output_size: tuple[int, int],
    need_grad: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient in front of an activation, and its sum over all but the channels.

    Args:
        saved: as :func:`activate` gives it.
        output_size: height and width in front of a pool.
    """
    if not (need_grad or need_bias):
        return None, None
    if act == Act.NONE and not need_bias:
        return grad, None
    kind, slope, pool = act.arguments
    if pool:
        return ops.max_pool_bias_grad(grad, saved, output_size, need_grad, pool)
    mask, input = (None, saved) if act.smooth else (saved, None)
    passed, grad_bias = ops.activate_grad(grad, mask, input, kind, slope, need_grad, need_bias)
    return (grad if act.kind == Kind.NONE else passed), grad_bias if need_bias else None
