"""Convolutions on weights prepared beforehand: forward, data gradient and weight gradient.

An algorithm is made for one layer, one input size and the weights as they are, holds them in the
form it needs, and is called back by the chains of ``csrc/chains``, where the library's own
convolution is, too. All take and give tensors in channels_last and of the chain's type. Biases and
their gradients may be float32 all the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from ..activation import Act, activate, masked
from ..support import dense
from .copies import Copies
from .geometry import Geometry

ops = torch.ops.wus
aten = torch.ops.aten


class Trained(Protocol):
    """What the gradient of a weight is made from, besides the output's (``chains.Trained``)."""

    input: Tensor
    weight: Tensor


class NormGrad(Protocol):
    """The backward of a normalisation of z: a * g + b * z + c for each channel.

    Attributes:
        scale, shift: the forward's, where backward is to compute an activation's input from z.
        rows: all that is given, [3 or 5, channels].
    """

    a: Tensor
    b: Tensor
    c: Tensor
    scale: Tensor | None
    shift: Tensor | None
    rows: Tensor


def through_norm(
    norm: NormGrad,
    grad: Tensor,
    z: Tensor,
    mask: Tensor | None,
    act: Act,
    need_residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of z, which was normalised, and of what was added before ``act``."""
    coefficients, affine = (norm.a, norm.b, norm.c), (norm.scale, norm.shift)
    return ops.batch_norm_grad_input(
        grad, z, *coefficients, mask, *affine, *act.arguments, need_grad_residual=need_residual
    )


class Algorithm(ABC):
    """A convolution on given weights, and what surrounds it in a chain.

    Where backward is handed what trains the weight, it gives the weight's gradient too.
    """

    geometry: Geometry
    #: For people.
    name: str

    @abstractmethod
    def forward(self, input: Tensor, bias: Tensor | None, act: Act) -> tuple[Tensor, Tensor | None]:
        """act(conv(input) + bias), and what backward needs: bits, codes or act's input."""

    def backward(
        self,
        grad: Tensor,
        mask: Tensor | None,
        act: Act,
        need_input: bool,
        need_bias: bool,
        trained: Trained | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, bias and weight; here by a pass of its own for the activation."""
        need_grad = need_input or trained is not None
        passed, grad_bias = masked(grad, mask, act, self.geometry.output_size, need_grad, need_bias)
        if passed is None:
            return None, grad_bias, None
        grad_input, grad_weight = self._both(passed, need_input, trained)
        return grad_input, grad_bias, grad_weight

    @abstractmethod
    def forward_stats(self, input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """conv(input) + bias, and each channel's mean and biased variance."""

    @abstractmethod
    def dgrad(self, grad: Tensor) -> Tensor:
        """The gradient of the input."""

    @abstractmethod
    def wgrad(self, grad: Tensor, trained: Trained) -> Tensor:
        """The gradient of the weight."""

    def backward_norm(
        self,
        grad: Tensor,
        z: Tensor,
        norm: NormGrad,
        mask: Tensor | None,
        act: Act,
        need_input: bool,
        need_residual: bool,
        trained: Trained | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the input, of what was added before ``act``, and of the weight.

        They go through an activation and a normalisation of ``z``; here by a pass of its own.
        """
        if not need_input and trained is None:
            size = self.geometry.output_size
            return None, masked(grad, mask, act, size, True, False)[0], None
        apart = need_residual and act != Act.NONE
        grad_z, grad_residual = through_norm(norm, grad, z, mask, act, apart)
        grad_input, grad_weight = self._both(grad_z, need_input, trained)
        return grad_input, grad_residual if apart else grad, grad_weight

    def _both(
        self, grad: Tensor, need_input: bool, trained: Trained | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of input and weight, those that are wanted."""
        return (
            self.dgrad(grad) if need_input else None,
            None if trained is None else self.wgrad(grad, trained),
        )

    def forward_add(
        self, input: Tensor, bias: Tensor | None, residual: Tensor, act: Act
    ) -> tuple[Tensor, Tensor | None]:
        """act(conv(input) + bias + residual); the activation is none or one that saves bits."""
        output, _ = self.forward(input, bias, Act.NONE)
        if act == Act.NONE:
            output += residual
            return output, None
        return ops.activate(output, residual, *act.function)


class Strided(Algorithm):
    """3x3 with stride 2 or 1x1 with any stride, on weights that were packed before."""

    name = "strided"

    def __init__(self, geometry: Geometry, copies: Copies) -> None:
        self.out_channels, self.in_channels = geometry.out_channels, geometry.in_channels
        self.geometry = geometry
        self.window = geometry.kernel_size, geometry.stride, geometry.padding
        self.copies = copies

    def forward(self, input: Tensor, bias: Tensor | None, act: Act) -> tuple[Tensor, Tensor | None]:
        return activate(self._convolve(input, bias), act)

    def forward_stats(self, input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        output = self._convolve(input, bias)
        mean, var = ops.batch_norm_stats(output)
        return output, mean, var

    def dgrad(self, grad: Tensor) -> Tensor:
        size = self.geometry.input_size
        return ops.strided_dgrad(grad, self.copies.dgrad(), self.in_channels, size, *self.window)

    def wgrad(self, grad: Tensor, trained: Trained) -> Tensor:
        g, rest = self.geometry, (False, [0, 0], self.geometry.groups, [False, True, False])
        numbers = g.stride, g.padding, g.dilation
        return aten.convolution_backward(
            dense(grad), trained.input, trained.weight, None, *numbers, *rest
        )[1]

    def _convolve(self, input: Tensor, bias: Tensor | None) -> Tensor:
        packed = self.copies.forward()
        return ops.strided_forward(input, packed, bias, self.out_channels, *self.window)
