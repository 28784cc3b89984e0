"""The fused chains of the skip program: layers that run as one and save masks, not activations.

A chain refers to the model's own layers, so parameters, buffers and modes are shared. Where the
fused kernels do not apply (another dtype or device, a layer that does not skip), a chain
calls its layers one by one: module-level skip operators, and stock code for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import nn as skip_nn
from .algorithms import Act, Algorithm, choose
from .autograd import ConvAct, ConvAddAct, ConvNormAct, Dropout, LinearAct
from .geometry import Geometry
from .options import SkipOptions
from .packing import PackedWeights
from .products import FrozenProduct
from .support import fused_dtype, takes


@dataclass
class ConvChain:
    """conv [+ batch norm] [+ residual] [+ ReLU [+ 2x2 max-pool]].

    Attributes:
        layers: the steps in order for the unfused path; the residual is added by the step None.
        free_layout: every user is a chain too, so that the output may be channels_last even where
            stock would give another layout.
    """

    conv: skip_nn.Conv2d
    norm: nn.BatchNorm2d | None
    act: Act
    layers: list[Callable | None]
    packed: PackedWeights
    options: SkipOptions
    free_layout: bool = False

    def __call__(
        self, input: Tensor, channels_last: bool, residual: Tensor | None = None
    ) -> Tensor:
        dtype = self._fused_dtype(input, residual)
        if dtype is None:
            if not channels_last:  # what a chain before left as it liked
                input = input.contiguous()
            return self._unfused(input, residual)
        input = input.to(dtype).contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        output = self._fused(input, residual)
        return output if channels_last or self.free_layout else output.contiguous()

    def _unfused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        for layer in self.layers:
            input = input + residual if layer is None else layer(input)
        return input

    def _fused_dtype(self, input: Tensor, residual: Tensor | None) -> torch.dtype | None:
        """The type in which the chain can run fused, or None."""
        conv = self.conv
        dtype = fused_dtype(input, conv.weight, conv.bias)
        if (
            dtype is None
            or input.dim() != 4
            or input.size(1) != conv.in_channels
            or not conv.skip_wgrad
            or conv.padding_mode != "zeros"
            or isinstance(conv.padding, str)
        ):
            return None
        geometry = Geometry.of(conv, input)
        expected = (input.size(0), conv.out_channels, *geometry.output_size)
        fits = (
            min(geometry.output_size) >= (2 if self.act == Act.RELU_POOL else 1)
            and (
                residual is None
                or (takes(residual) and residual.dtype == dtype and residual.shape == expected)
            )
            and (self.norm is None or self._norm_fits(expected))
        )
        return dtype if fits else None

    def _norm_fits(self, size: tuple[int, ...]) -> bool:
        norm = self.norm
        batch = skip_nn.uses_batch_statistics(norm)
        if norm.weight is not None and norm.weight.requires_grad and not batch:
            return False  # a scale that trains cannot be folded away
        return (
            norm.num_features == size[1]
            and (norm.weight is None or norm.weight.dtype == torch.float32)
            and (norm.running_mean is None or norm.running_mean.dtype == torch.float32)
            and (size[0] * size[2] * size[3] > 1 or not batch)
        )

    def _fused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        conv, norm = self.conv, self.norm
        geometry = Geometry.of(conv, input)
        weight, sources = conv.weight.detach, (conv.weight,)
        if norm is not None and skip_nn.uses_batch_statistics(norm):
            algorithm = self._choose(input, geometry, weight, sources)
            gamma = norm.weight
            if gamma is not None and getattr(norm, "skip_wgrad", False):
                gamma = gamma.detach()
            return ConvNormAct.apply(
                input, conv.bias, gamma, norm.bias, residual, algorithm, norm, self.act
            )
        bias = conv.bias
        if norm is not None:
            weight, bias, sources = fold(conv, norm)
        algorithm = self._choose(input, geometry, weight, sources)
        if residual is not None:
            return ConvAddAct.apply(input, bias, residual, algorithm, self.act)
        return ConvAct.apply(input, bias, algorithm, self.act)

    def _choose(
        self,
        input: Tensor,
        geometry: Geometry,
        weight: Callable[[], Tensor],
        sources: tuple[Tensor, ...],
    ) -> Algorithm:
        return choose(
            self.conv,
            geometry,
            weight,
            sources,
            self.options,
            self.packed,
            wants_dgrad(input),
            input.dtype,
        )


@dataclass
class LinearChain:
    """linear [+ ReLU [+ dropout]]."""

    linear: skip_nn.Linear
    relu: bool
    dropout: nn.Dropout | None
    layers: list[Callable]
    packed: PackedWeights

    def __call__(self, input: Tensor) -> Tensor:
        linear = self.linear
        p = self.dropout.p if self.dropout is not None and self.dropout.training else 0.0
        dtype = fused_dtype(input, linear.weight, linear.bias)
        fused = (
            dtype is not None
            and input.dim() == 2
            and input.size(1) == linear.in_features
            and linear.skip_wgrad
            and p < 1.0
        )
        if not fused:
            for layer in self.layers:
                input = layer(input)
            return input
        input = input.to(dtype)
        product = FrozenProduct.of(linear, input, self.packed, wants_dgrad(input))
        return LinearAct.apply(input, linear.bias, product, self.relu, p)


@dataclass
class DropoutChain:
    """Dropout that saves one bit an element."""

    dropout: nn.Dropout

    def __call__(self, input: Tensor) -> Tensor:
        p = self.dropout.p
        rows = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
        dense = rows or input.is_contiguous()
        if not (self.dropout.training and 0.0 < p < 1.0 and takes(input) and dense):
            return self.dropout(input)
        if input.dim() == 4 and not rows:  # the kernels would turn it into channels_last
            return Dropout.apply(input.flatten(1), p).view(input.shape)
        return Dropout.apply(input, p)


def wants_dgrad(input: Tensor) -> bool:
    """Whether backward will be asked for the gradient of `input`."""
    return input.requires_grad and torch.is_grad_enabled()


def fold(
    conv: nn.Conv2d, norm: nn.BatchNorm2d
) -> tuple[Callable[[], Tensor], Tensor, tuple[Tensor, ...]]:
    """A normalisation with running statistics as part of its convolution.

    Returns:
        What makes the scaled weight; the bias, through which the gradients of both layers' biases
        flow; and the tensors that the weight is made from.
    """

    def scale() -> Tensor:
        inverse = torch.rsqrt(norm.running_var + norm.eps)
        return inverse if norm.weight is None else inverse * norm.weight.detach()

    # Batch norm writes running statistics past their version counters; the count of batches tells.
    seen = (conv.weight, norm.running_var, norm.num_batches_tracked, norm.weight)
    sources = tuple(tensor for tensor in seen if tensor is not None)
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = bias * scale()
    if norm.bias is not None:
        bias = bias + norm.bias
    return lambda: conv.weight.detach() * scale()[:, None, None, None], bias, sources
