"""cuDNN's one kernel for data gradient, mask and bias gradient, where it beats two passes."""

from __future__ import annotations

import torch
from torch import Tensor

from .algorithms import Direct, Unfused
from .support import on_gpu
from .tuning import Choices, Way

ops = torch.ops.wus
choices = Choices()


def suits(algorithm: Unfused, grad: Tensor) -> bool:
    """Whether cuDNN may have such a kernel: stride 1, one group, channels in eights.

    Where results must be the same in every run no choice may depend on times.
    """
    if not (isinstance(algorithm, Direct) and on_gpu(grad)):
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
    algorithm: Direct, grad: Tensor, mask: Tensor, two_passes: Way
) -> tuple[Tensor, ...]:
    """The gradient of the input behind the mask, and its sum over all but the channels.

    The first call for a shape compares both ways and times them; later ones take the better.
    """
    geometry, weight = algorithm.geometry, algorithm.weight
    numbers = (geometry.input_size, geometry.padding, geometry.dilation)
    tf32 = grad.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    key = (grad.device, grad.dtype, tf32, tuple(grad.shape), tuple(weight.shape), *numbers)

    def one_kernel() -> tuple[Tensor, ...]:
        return ops.conv_dgrad_relu(grad, weight, mask, *numbers)

    def exists() -> bool:
        return ops.conv_dgrad_relu_exists(grad, weight, *numbers)

    return (one_kernel if choices.prefer(key, exists, one_kernel, two_passes) else two_passes)()
