"""cuDNN's kernels for data gradient and mask, with or without the bias gradient, where they beat
two passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor

from ..conv.algorithm import Direct, Unfused
from ..support import on_gpu, tf32_convolutions
from .tuning import Candidate, Choices

ops = sums = torch.ops.wus  # apart for tests: cuDNN's part cannot be emulated
choices = Choices()


def suits(algorithm: Unfused, grad: Tensor) -> TypeGuard[Direct]:
    """Whether cuDNN may have such a kernel: stride 1, one group, channels in eights.

    Where results must be the same in every run no choice may depend on times.
    """
    if not (isinstance(algorithm, Direct) and on_gpu(grad) and torch.backends.cudnn.enabled):
        return False
    if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
        return False
    geometry, weight = algorithm.geometry, algorithm.weight
    return (
        geometry.stride == (1, 1)
        and geometry.groups == 1
        and weight.size(0) % 8 == 0
        and weight.size(1) % 8 == 0
        and grad.dtype == weight.dtype
    )


def dgrad_relu(
    algorithm: Direct, grad: Tensor, mask: Tensor, two_passes: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The gradient of the input behind the mask, and its sum over all but the channels.

    The first call for a shape compares the ways there are and times them; later ones take the best.
    """
    geometry, weight = algorithm.geometry, algorithm.weight
    numbers = (geometry.input_size, geometry.padding, geometry.dilation)
    tf32 = grad.dtype == torch.float32 and tf32_convolutions()
    key = (grad.device, grad.dtype, tf32, tuple(grad.shape), tuple(weight.shape), *numbers)

    def one_kernel() -> tuple[Tensor, Tensor]:
        return ops.conv_dgrad_relu(grad, weight, mask, *numbers, True, tf32)

    def sum_apart() -> tuple[Tensor, Tensor]:
        grad_input, _ = ops.conv_dgrad_relu(grad, weight, mask, *numbers, False, tf32)
        return grad_input, sums.activate_grad(grad_input, act=0)[1]

    def exists(sum: bool) -> bool:
        return ops.conv_dgrad_relu_exists(grad, weight, *numbers, sum, tf32)

    ways = (one_kernel, sum_apart)
    candidates = [Candidate(partial(exists, way is one_kernel), way) for way in ways]
    chosen = choices.best(key, two_passes, candidates)
    return two_passes() if chosen is None else ways[chosen]()
