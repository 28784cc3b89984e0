"""Depthwise convolutions: one filter a channel, 3x3 or 5x5, stride 1 or 2.

No copy of the weight is kept: it is as small as a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Act
from ..support import Unchanged, single
from .algorithm import Trained
from .geometry import Geometry
from .rowwise import Rowwise

ops = torch.ops.wus


class Depthwise(Rowwise):
    """On the weight as it is, in float32 whatever the type of maps."""

    name = "depthwise"

    def __init__(self, geometry: Geometry, weight: Tensor) -> None:
        self.geometry = geometry
        self.weight = weight.float()
        self._window = geometry.stride, geometry.padding
        self._unchanged = Unchanged(self.weight)

    def forward_stats(self, input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return ops.depthwise_forward_stats(input, self.weight, single(bias), *self._window)

    def _convolve(self, input: Tensor, bias: Tensor | None, act: Act) -> tuple[Tensor, Tensor]:
        bias = single(bias)
        return ops.depthwise_forward(input, self.weight, bias, *self._window, *act.function)

    def _gradients(
        self,
        grad: Tensor,
        mask: Tensor | None,
        z: Tensor | None,
        norm: Tensor | None,
        act: Act,
        need_input: bool,
        need_bias: bool,
        trained: Trained | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        input = None if trained is None else trained.input
        return ops.depthwise_backward(
            grad,
            self._unchanged(),
            input,
            self.geometry.input_size,
            *self._window,
            mask,
            z,
            norm,
            *act.function,
            need_grad_input=need_input,
            need_grad_bias=need_bias,
        )
