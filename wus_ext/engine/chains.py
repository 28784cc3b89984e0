"""The fused chains of a program: layers that run as one and save masks, not activations.

Where a chain's weight trains (options.full), its input is saved too.

A chain refers to the model's own layers, so parameters, buffers and modes are shared. Where the
fused kernels do not apply (another dtype or device, a layer that does not skip), a chain
calls its layers one by one: module-level skip operators, and stock code for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import nn as skip_nn
from .autograd import ConvAct, ConvAddAct, ConvNormAct, Dropout, LinearAct
from .conv.algorithm import Act, Algorithm, Unfused
from .conv.choice import choose
from .conv.geometry import Geometry
from .gpu.linked import ConvLayer, Held, LinearLayer, linked, suits_cublaslt
from .linear import Products
from .options import SkipOptions
from .packed_weights import PackedWeights
from .support import fused_dtype, on_gpu, takes


@dataclass
class ConvChain:
    """conv [+ batch norm] [+ residual] [+ ReLU [+ 2x2 max-pool]].

    Attributes:
        layers: the steps in order for the unfused path; the residual is added by the step None.
        free_layout: every user is a chain too, so that the output may be channels_last even where
            stock would give another layout.
        above: the chain that takes the output, where it may undo this one's ReLU.
    """

    conv: skip_nn.Conv2d
    norm: nn.BatchNorm2d | None
    act: Act
    layers: list[Callable | None]
    packed: PackedWeights
    options: SkipOptions
    free_layout: bool = False
    above: ConvChain | None = None

    def __call__(
        self, input: Tensor | Held, channels_last: bool, residual: Tensor | None = None
    ) -> Tensor | Held:
        expire_unless_skipping(self.conv, self.packed)
        below, input = opened(input)
        dtype = self._fused_dtype(input, residual)
        if below is not None and dtype != input.dtype:
            below, input = None, below.settled()
        if dtype is None:
            if not channels_last:  # what a chain before left as it liked
                input = input.contiguous()
            return self._unfused(input, residual)
        input = input.to(dtype).contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        output = self._fused(input, residual, below)
        free = channels_last or self.free_layout or isinstance(output, Held)
        return output if free else output.contiguous()

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
            or not may_fuse(conv, self.options)
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
        gamma = norm.weight
        # In a window gamma changes also between two evaluations, which share what was folded.
        moves = gamma is not None and gamma.requires_grad and self.conv.skip_wgrad
        if not batch and (moves or trains(gamma) or trains(self._weight())):
            return False  # what trains cannot be folded away
        return (
            norm.num_features == size[1]
            and (norm.weight is None or norm.weight.dtype == torch.float32)
            and (norm.running_mean is None or norm.running_mean.dtype == torch.float32)
            and (size[0] * size[2] * size[3] > 1 or not batch)
        )

    def _fused(self, input: Tensor, residual: Tensor | None, below: Held | None) -> Tensor | Held:
        conv, norm = self.conv, self.norm
        geometry, trained = Geometry.of(conv, input), self._weight()
        weight, sources = conv.weight.detach, (conv.weight,)
        backward = wants_dgrad(input) if below is None else below.wants_grad()
        if norm is not None and skip_nn.uses_batch_statistics(norm):
            input = input if below is None else below.settled()
            algorithm = self._choose(input, geometry, weight, sources, backward)
            gamma = norm.weight
            if gamma is not None and getattr(norm, "skip_wgrad", False):
                gamma = gamma.detach()
            return ConvNormAct.apply(
                input, conv.bias, trained, gamma, norm.bias, residual, algorithm, norm, self.act
            )
        bias = conv.bias
        if norm is not None:
            weight, bias, sources = fold(conv, norm)
        algorithm = self._choose(input, geometry, weight, sources, backward)
        if isinstance(algorithm, Unfused) and not trains(trained):
            hold = self.above is not None and self.act == Act.RELU and torch.is_grad_enabled()
            if hold or below is not None:
                layer = ConvLayer(algorithm, self.act, "cudnn" in self.options.epilogues)
                return linked(layer, input, bias, residual, below, hold)
        if below is not None:
            input = below.settled()
        if residual is not None:
            return ConvAddAct.apply(input, bias, trained, residual, algorithm, self.act)
        return ConvAct.apply(input, bias, trained, algorithm, self.act)

    def _weight(self) -> Tensor | None:
        """The weight, for its gradient; None in a skip step."""
        return None if self.conv.skip_wgrad else self.conv.weight

    def _choose(
        self,
        input: Tensor,
        geometry: Geometry,
        weight: Callable[[], Tensor],
        sources: tuple[Tensor, ...],
        backward: bool,
    ) -> Algorithm:
        algorithm = choose(
            self.conv,
            geometry,
            weight,
            sources,
            self.options,
            self.packed,
            backward,
            input.dtype,
        )
        expire_unless_skipping(self.conv, self.packed)
        return algorithm


@dataclass
class LinearChain:
    """linear [+ ReLU [+ dropout]].

    Attributes:
        above: the chain that takes the output, where it may undo this one's ReLU.
    """

    linear: skip_nn.Linear
    relu: bool
    dropout: nn.Dropout | None
    layers: list[Callable]
    packed: PackedWeights
    options: SkipOptions
    above: LinearChain | None = None

    def __call__(self, input: Tensor | Held) -> Tensor | Held:
        expire_unless_skipping(self.linear, self.packed)
        below, input = opened(input)
        dtype = self._fused_dtype(input, input.size(-1) if input.dim() == 2 else -1)
        if below is not None and dtype != input.dtype:
            below, input = None, below.settled()
        if dtype is None:
            for layer in self.layers:
                input = layer(input)
            return input
        input = input.to(dtype)
        bias, p = self.linear.bias, self._p()
        if not self.linear.skip_wgrad:
            input = input if below is None else below.settled()
            product = Products.training(self.linear)
            return LinearAct.apply(input, bias, self.linear.weight, product, self.relu, p)
        backward = wants_dgrad(input) if below is None else below.wants_grad()
        product = Products.frozen(self.linear, input, self.packed, backward)
        hold = self.above is not None and self.relu and p == 0.0 and torch.is_grad_enabled()
        if not hold and below is None:
            return LinearAct.apply(input, bias, None, product, self.relu, p)
        opaque = hold and self._suits_cublaslt(input)
        layer = LinearLayer(product, self.relu, p, opaque, below is not None and below.opaque)
        return linked(layer, input, bias, None, below, hold)

    def _fused_dtype(self, input: Tensor, features: int) -> torch.dtype | None:
        """The type in which the chain can run fused on [N, features] like `input`, or None."""
        linear = self.linear
        fits = features == linear.in_features and may_fuse(linear, self.options) and self._p() < 1.0
        return fused_dtype(input, linear.weight, linear.bias) if fits else None

    def _p(self) -> float:
        return self.dropout.p if self.dropout is not None and self.dropout.training else 0.0

    def _suits_cublaslt(self, input: Tensor) -> bool:
        """Whether ReLU and mask may be cuBLASLt's: the chain above, too, must find its product."""
        features, above = self.linear.out_features, self.above
        return (
            "cublaslt" in self.options.epilogues
            and self.linear.bias is not None
            and above._fused_dtype(input, features) == input.dtype
            and suits_cublaslt(input, features, above.linear.out_features)
        )


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


def opened(input: Tensor | Held) -> tuple[Held | None, Tensor]:
    """What the chain below left to do, if it did, and its output."""
    return (input, input.output) if isinstance(input, Held) else (None, input)


def may_fuse(layer: skip_nn.SkipLayer, options: SkipOptions) -> bool:
    """Whether a layer may run fused: it skips, or its full steps are not to be stock's."""
    return layer.skip_wgrad or (options.full == "fused" and not on_gpu(layer.weight))


def expire_unless_skipping(layer: skip_nn.SkipLayer, packed: PackedWeights) -> None:
    """What is made of a weight that trains serves one call only."""
    if not layer.skip_wgrad:
        packed.expire((layer,))


def trains(weight: Tensor | None) -> bool:
    """Whether a weight is to get a gradient."""
    return weight is not None and weight.requires_grad and torch.is_grad_enabled()


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
