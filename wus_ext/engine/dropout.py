"""Dropout that saves one bit an element."""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import Dropout
from .support import takes


def drop(input: Tensor, p: float) -> Tensor | None:
    """Dropout in training, 0 < p < 1, with stock's random numbers on the CPU.

    Returns:
        The output, or None where the kernels do not take `input`.
    """
    rows = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    if not takes(input) or not (rows or input.is_contiguous()):
        return None
    return Dropout.apply(input, p)
