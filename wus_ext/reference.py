"""What a skip step must equal: stock PyTorch with the weight detached, slow and memory-hungry.

The tests compare every operator of :mod:`wus_ext.functional` with its twin here.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    skip_wgrad: bool = False,
) -> Tensor:
    """Stock twin of :func:`wus_ext.functional.conv2d`."""
    weight = weight.detach() if skip_wgrad else weight
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, skip_wgrad: bool = False
) -> Tensor:
    """Stock twin of :func:`wus_ext.functional.linear`."""
    return F.linear(input, weight.detach() if skip_wgrad else weight, bias)
