"""1x1 convolutions of unit stride: products of pixels and a weight that was packed before."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Act
from .algorithm import Trained
from .copies import Copies
from .geometry import Geometry
from .rowwise import Rowwise

ops = torch.ops.wus


class Pointwise(Rowwise):
    """On the weight packed for the forward pass, and its transpose for the data gradient."""

    name = "1x1"

    def __init__(self, geometry: Geometry, copies: Copies) -> None:
        self.geometry = geometry
        self.copies = copies

    def forward_stats(self, input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        outputs = self.geometry.out_channels
        return ops.pointwise_forward_stats(input, self.copies.forward(), bias, outputs)

    def _convolve(self, input: Tensor, bias: Tensor | None, act: Act) -> tuple[Tensor, Tensor]:
        outputs = self.geometry.out_channels
        return ops.pointwise_forward(input, self.copies.forward(), bias, outputs, *act.function)

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
        input = weight = None
        if trained is not None:
            input, weight = trained.input, trained.weight
        layout = torch.channels_last
        return ops.pointwise_backward(
            grad,
            self.copies.dgrad() if need_input else None,
            input,
            self.geometry.in_channels,
            mask,
            z,
            norm,
            *act.function,
            need_grad_bias=need_bias,
            channels_last=weight is not None and weight.is_contiguous(memory_format=layout),
        )
