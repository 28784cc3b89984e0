"""What a skip step must equal: stock PyTorch with the weight detached, slow and memory-hungry.

The tests compare every operator of :mod:`wus_ext.functional` with its twin here: stock's function
of the same name and signature, with a skip flag.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def _twin(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(stock)
    def twin(
        input: Tensor, weight: Tensor, *args: Any, skip_wgrad: bool = False, **options: Any
    ) -> Tensor:
        return stock(input, weight.detach() if skip_wgrad else weight, *args, **options)

    return twin


conv1d = _twin(F.conv1d)
conv2d = _twin(F.conv2d)
conv3d = _twin(F.conv3d)
conv_transpose1d = _twin(F.conv_transpose1d)
conv_transpose2d = _twin(F.conv_transpose2d)
conv_transpose3d = _twin(F.conv_transpose3d)
linear = _twin(F.linear)
