"""Convolutions on weights prepared beforehand: forward, data gradient and weight gradient.

An algorithm is made for one layer, one input size and the weights as they are, holds them in the
form it needs, and is shared by the chains of :mod:`wus_ext.engine.chains`. All take and give
tensors in channels_last and of the chain's type. Biases and their gradients may be float32 all the
same. In low precision the library's own convolution is the only one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..activation import Act, activate, masked
from ..support import Unchanged, dense
from .copies import Copies
from .geometry import Geometry

ops = torch.ops.wus
aten = torch.ops.aten


class Trained(NamedTuple):
    """What the gradient of a weight is made from, besides the output's gradient."""

    input: Tensor
    weight: Tensor


class NormGrad(NamedTuple):
    """The backward of a normalisation of z: a * g + b * z + c for each channel.

    ``scale`` and ``shift`` are the forward's, where backward is to compute an activation's input
    from z.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """All that is given, [3 or 5, channels]."""
        return torch.stack([row for row in self if row is not None])

    def backward(
        self, grad: Tensor, z: Tensor, mask: Tensor | None, act: Act, need_residual: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Gradients of z and of what was added before ``act``."""
        return ops.batch_norm_grad_input(
            grad,
            z,
            self.a,
            self.b,
            self.c,
            mask,
            self.scale,
            self.shift,
            *act.arguments,
            need_grad_residual=need_residual,
        )


class Algorithm(ABC):
    """A convolution on given weights, and what surrounds it in a chain.

    Where backward is handed what trains the weight, it gives the weight's gradient too.
    """

    geometry: Geometry
    #: For people.
    name: str
    #: Whether `forward_stats` adds the bias, which a normalisation takes away again; where it does
    #: not, all is as if it had, but for the mean.
    adds_bias = True

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
        """conv(input) + bias, and each channel's mean and biased variance; see `adds_bias`."""

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
        grad_z, grad_residual = norm.backward(grad, z, mask, act, apart)
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


class Unfused(Algorithm):
    """A convolution and element-wise kernels that save masks; subclasses give the convolution."""

    def forward(self, input: Tensor, bias: Tensor | None, act: Act) -> tuple[Tensor, Tensor | None]:
        return activate(self._convolve(input, bias), act)

    def forward_stats(self, input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        output = self._convolve(input, bias)
        mean, var = ops.batch_norm_stats(output)
        return output, mean, var

    def wgrad(self, grad: Tensor, trained: Trained) -> Tensor:
        g, (input, weight) = self.geometry, trained
        grad = dense(grad)
        return aten.convolution_backward(
            grad,
            input,
            weight,
            None,
            g.stride,
            g.padding,
            g.dilation,
            False,
            [0, 0],
            g.groups,
            [False, True, False],
        )[1]

    @abstractmethod
    def _convolve(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution, alone."""


class Direct(Unfused):
    """The library's own convolution: oneDNN's, cuDNN's."""

    name = "oneDNN"

    def __init__(self, geometry: Geometry, make: Callable[[], Tensor]) -> None:
        self.geometry = geometry
        self._make = make
        self._made: Unchanged | None = None

    @property
    def weight(self) -> Tensor:
        if self._made is None:
            self._made = Unchanged(self._make())
        return self._made()

    def alone(self, input: Tensor, bias: Tensor | None, trained: Tensor | None) -> Tensor:
        """conv(input) + bias and no more, with a backward of its own, which no Python delays.

        Args:
            trained: the weight, where it gets a gradient.
        """
        g, bias = self.geometry, None if bias is None else bias.to(input.dtype)
        window = g.stride, g.padding, g.dilation
        if trained is not None:
            return dense(aten.conv2d(input, trained.to(input.dtype), bias, *window, g.groups))
        return dense(ops.convolution(input, self.weight, bias, *window, False, [0, 0], g.groups))

    def dgrad(self, grad: Tensor) -> Tensor:
        g, weight = self.geometry, self.weight
        left_over = [
            g.input_size[i]
            - (g.output_size[i] - 1) * g.stride[i]
            + 2 * g.padding[i]
            - g.dilation[i] * (weight.size(i + 2) - 1)
            - 1
            for i in range(2)
        ]
        # Of an output gradient of one pixel oneDNN makes an input gradient in the weight's layout.
        return dense(
            aten.convolution(
                grad, weight, None, g.stride, g.padding, g.dilation, True, left_over, g.groups
            )
        )

    def wgrad(self, grad: Tensor, trained: Trained) -> Tensor:
        return super().wgrad(grad, trained._replace(weight=self.weight))

    def _convolve(self, input: Tensor, bias: Tensor | None) -> Tensor:
        g, bias = self.geometry, None if bias is None else bias.to(input.dtype)
        output = aten.conv2d(input, self.weight, bias, g.stride, g.padding, g.dilation, g.groups)
        # With one channel in, input and weight are of both layouts, and oneDNN chooses the other.
        return dense(output)


class OnGpu(Direct):
    """cuDNN's convolution without its bias; one pass of ours adds the bias and all that follows.

    The bias may be float32 behind a convolution in low precision, so that it is never cast.
    """

    name = "cuDNN"
    adds_bias = False  # a pass of its own over the output

    def forward(self, input: Tensor, bias: Tensor | None, act: Act) -> tuple[Tensor, Tensor | None]:
        if bias is None:
            return super().forward(input, None, act)
        return self._shift(self._convolve(input, None), bias, None, act)

    def forward_add(
        self, input: Tensor, bias: Tensor | None, residual: Tensor, act: Act
    ) -> tuple[Tensor, Tensor | None]:
        if bias is None:
            return super().forward_add(input, None, residual, act)
        return self._shift(self._convolve(input, None), bias, residual, act)

    def forward_stats(self, input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        output, mean, var = super().forward_stats(input, None)
        # What is not finite makes all behind the normalisation NaN.
        return output, mean if bias is None else mean.add(bias, alpha=0), var

    @staticmethod
    def _shift(
        output: Tensor, bias: Tensor, residual: Tensor | None, act: Act
    ) -> tuple[Tensor, Tensor | None]:
        output, mask = ops.batch_norm_apply(output, None, bias.float(), residual, *act.arguments)
        return output, (None if act == Act.NONE else mask)


class Strided(Unfused):
    """3x3 with stride 2 or 1x1 with any stride, on weights that were packed before."""

    name = "strided"

    def __init__(self, geometry: Geometry, copies: Copies) -> None:
        self.out_channels, self.in_channels = geometry.out_channels, geometry.in_channels
        self.geometry = geometry
        self.window = geometry.kernel_size, geometry.stride, geometry.padding
        self.copies = copies

    def dgrad(self, grad: Tensor) -> Tensor:
        size = self.geometry.input_size
        return ops.strided_dgrad(grad, self.copies.dgrad(), self.in_channels, size, *self.window)

    def _convolve(self, input: Tensor, bias: Tensor | None) -> Tensor:
        packed = self.copies.forward()
        return ops.strided_forward(input, packed, bias, self.out_channels, *self.window)


class Given(Unfused):
    """The output of a convolution that has run already, because somebody else holds it, too."""

    name = "given"

    def __init__(self, image: Tensor) -> None:
        channels, size = image.size(1), (image.size(2), image.size(3))
        self.geometry = Geometry(channels, channels, (1, 1), (1, 1), (0, 0), (1, 1), 1, size, size)

    def forward(self, input: Tensor, bias: Tensor | None, act: Act) -> tuple[Tensor, Tensor | None]:
        return activate(input, act, in_place=False)

    def forward_add(
        self, input: Tensor, bias: Tensor | None, residual: Tensor, act: Act
    ) -> tuple[Tensor, Tensor | None]:
        if act == Act.NONE:
            return input + residual, None
        return ops.activate(input, residual, *act.function)

    def dgrad(self, grad: Tensor) -> Tensor:
        return grad

    def _convolve(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return input
