"""The fused chains of the skip program: layers that run as one and save masks, not activations.

A chain refers to the model's own layers, so parameters, buffers and modes are shared. Where the
fused kernels do not apply (another dtype or device, autocast, a layer that does not skip), a chain
calls its layers one by one: module-level skip operators, and stock code for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import nn as skip_nn
from .algorithms import Act, Algorithm, Geometry, choose, masked
from .options import SkipOptions
from .packing import PackedWeights

ops = torch.ops.wus


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
        if not self._can_fuse(input, residual):
            if not channels_last:  # what a chain before left as it liked
                input = input.contiguous()
            return self._unfused(input, residual)
        input = input.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        output = self._fused(input, residual)
        return output if channels_last or self.free_layout else output.contiguous()

    def _unfused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        for layer in self.layers:
            input = input + residual if layer is None else layer(input)
        return input

    def _can_fuse(self, input: Tensor, residual: Tensor | None) -> bool:
        conv, norm = self.conv, self.norm
        if not (
            runs_fused(input, conv.weight, conv.bias)
            and input.dim() == 4
            and input.size(1) == conv.in_channels
            and conv.skip_wgrad
            and conv.padding_mode == "zeros"
            and not isinstance(conv.padding, str)
        ):
            return False
        geometry = Geometry.of(conv, input)
        if min(geometry.output_size) < (2 if self.act == Act.RELU_POOL else 1):
            return False
        expected = (input.size(0), conv.out_channels, *geometry.output_size)
        if residual is not None and not (runs_fused(residual) and residual.shape == expected):
            return False
        if norm is None:
            return True
        values_a_channel = input.size(0) * geometry.output_size[0] * geometry.output_size[1]
        return (
            norm.num_features == conv.out_channels
            and (norm.weight is None or norm.weight.dtype == torch.float32)
            and (norm.running_mean is None or norm.running_mean.dtype == torch.float32)
            and (values_a_channel > 1 or not skip_nn.uses_batch_statistics(norm))
        )

    def _fused(self, input: Tensor, residual: Tensor | None) -> Tensor:
        conv, norm = self.conv, self.norm
        geometry = Geometry.of(conv, input)
        weight, sources = conv.weight.detach, (conv.weight,)
        if norm is not None and skip_nn.uses_batch_statistics(norm):
            algorithm = self._choose(geometry, weight, sources)
            gamma = norm.weight
            if gamma is not None and getattr(norm, "skip_wgrad", False):
                gamma = gamma.detach()
            return ConvNormAct.apply(
                input, conv.bias, gamma, norm.bias, residual, algorithm, norm, self.act
            )
        bias = conv.bias
        if norm is not None:
            weight, bias, sources = fold(conv, norm)
        algorithm = self._choose(geometry, weight, sources)
        if residual is not None:
            return ConvAddAct.apply(input, bias, residual, algorithm, self.act)
        return ConvAct.apply(input, bias, algorithm, self.act)

    def _choose(
        self, geometry: Geometry, weight: Callable[[], Tensor], sources: tuple
    ) -> Algorithm:
        return choose(self.conv, geometry, weight, sources, self.options, self.packed)


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
        fused = (
            runs_fused(input, linear.weight, linear.bias)
            and input.dim() == 2
            and input.size(1) == linear.in_features
            and linear.skip_wgrad
            and p < 1.0
        )
        if not fused:
            for layer in self.layers:
                input = layer(input)
            return input
        product = FrozenProduct.of(linear, input, self.packed)
        return LinearAct.apply(input, linear.bias, product, self.relu, p)


@dataclass
class DropoutChain:
    """Dropout that saves one bit an element."""

    dropout: nn.Dropout

    def __call__(self, input: Tensor) -> Tensor:
        p = self.dropout.p
        if not (self.dropout.training and 0.0 < p < 1.0 and runs_fused(input)):
            return self.dropout(input)
        return Dropout.apply(input, p)


def runs_fused(*tensors: Tensor | None) -> bool:
    """Whether the CPU's fused float32 kernels take these tensors as they are."""
    return not torch.is_autocast_enabled("cpu") and all(
        tensor is None
        or (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.device.type == "cpu"
            and tensor.dtype == torch.float32
            and tensor.layout == torch.strided
            and tensor.numel() > 0
        )
        for tensor in tensors
    )


def fold(
    conv: nn.Conv2d, norm: nn.BatchNorm2d
) -> tuple[Callable[[], Tensor], Tensor, tuple[Tensor, ...]]:
    """A normalisation with running statistics as part of its convolution.

    Returns:
        What makes the scaled weight; the bias, through which the gradients of both layers' biases
        flow; and the tensors that the weight is made from.
    """
    scale = torch.rsqrt(norm.running_var + norm.eps)
    sources = (conv.weight, norm.running_var)
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
        sources += (norm.weight,)
    bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias
    return lambda: conv.weight.detach() * scale[:, None, None, None], bias, sources


def _first_order(backward: Callable) -> Callable:
    """A backward without a derivative of its own says so, whatever was asked to require one."""

    @wraps(backward)
    def checked(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a fused skip step has no second derivative (create_graph=True); "
                "convert the model with fuse=False"
            )
        return backward(ctx, grad)

    return checked


def _dense(grad: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.channels_last)


class ConvAct(torch.autograd.Function):
    """act(conv(input) + bias); saves the mask."""

    @staticmethod
    def forward(ctx, input, bias, algorithm, act):
        output, mask = algorithm.forward(input, bias, act)
        ctx.save_for_backward(mask)
        ctx.algorithm, ctx.act = algorithm, act
        return output

    @staticmethod
    @_first_order
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        need_input, need_bias = ctx.needs_input_grad[:2]
        grad_input, grad_bias = ctx.algorithm.backward(
            _dense(grad), mask, ctx.act, need_input, need_bias
        )
        return grad_input, grad_bias if need_bias else None, None, None


class ConvAddAct(torch.autograd.Function):
    """act(conv(input) + bias + residual); saves the mask."""

    @staticmethod
    def forward(ctx, input, bias, residual, algorithm, act):
        output, _ = algorithm.forward(input, bias, Act.NONE)
        mask = None
        if act == Act.RELU:
            output, mask = ops.add_relu_mask(output, residual)
        else:
            output += residual
        ctx.save_for_backward(mask)
        ctx.algorithm, ctx.act = algorithm, act
        return output

    @staticmethod
    @_first_order
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        need_input, need_bias, need_residual = ctx.needs_input_grad[:3]
        algorithm = ctx.algorithm
        size = tuple(grad.shape[2:])
        grad, grad_bias = masked(
            _dense(grad), mask, ctx.act, size, need_input or need_residual, need_bias
        )
        return (
            algorithm.dgrad(grad) if need_input else None,
            grad_bias if need_bias else None,
            grad if need_residual else None,
            None,
            None,
        )


class ConvNormAct(torch.autograd.Function):
    """act(batch_norm(conv(input) + bias) + residual) with batch statistics.

    Saves the convolution's output, which the statistics' gradient needs, and the mask. A bias in
    front of batch statistics has no influence: its gradient is exactly zero.
    """

    @staticmethod
    def forward(ctx, input, bias, gamma, beta, residual, algorithm, norm, act):
        z, mean, var = algorithm.forward_stats(input, bias)
        count = z.numel() // z.size(1)
        momentum = skip_nn.count_batch(norm)
        if norm.training and norm.running_mean is not None:
            ops.batch_norm_update_running(
                norm.running_mean, norm.running_var, mean, var, momentum, count
            )
        scale, shift, invstd = ops.batch_norm_scale_shift(mean, var, gamma, beta, norm.eps)
        output, mask = ops.batch_norm_apply(z, scale, shift, residual, int(act))
        mask = None if act == Act.NONE else mask
        ctx.save_for_backward(z, mask, mean, invstd, gamma)
        ctx.algorithm, ctx.act, ctx.count, ctx.has_bias = algorithm, act, count, bias is not None
        return output

    @staticmethod
    @_first_order
    def backward(ctx, grad):
        z, mask, mean, invstd, gamma = ctx.saved_tensors
        need_input, need_bias, need_gamma, need_beta, need_residual = ctx.needs_input_grad[:5]
        act, algorithm = ctx.act, ctx.algorithm
        grad = _dense(grad)
        sums = ops.batch_norm_grad_sums(grad, z, mean, mask, act=int(act))
        *coefficients, grad_beta, grad_gamma = ops.batch_norm_grad_coefficients(
            *sums, mean, invstd, gamma, ctx.count
        )
        grad_input = grad_residual = None
        if need_residual and act == Act.RELU:
            grad, mask, act = ops.apply_mask(grad, mask), None, Act.NONE
        if need_residual:
            grad_residual = grad
        if need_input:
            grad_input = algorithm.dgrad_norm(grad, z, coefficients, mask, act)
        grad_bias = torch.zeros_like(mean) if need_bias else None
        return (
            grad_input,
            grad_bias,
            grad_gamma if need_gamma else None,
            grad_beta if need_beta else None,
            grad_residual,
            None,
            None,
            None,
        )


class FrozenProduct:
    """x @ weight.T and grad @ weight, with the weight packed by oneDNN where that pays."""

    #: Below this many values per weight a packed copy gains nothing.
    WORTH_PACKING = 1 << 18

    def __init__(self, weight: Tensor, packed: tuple[Tensor, ...]) -> None:
        self.weight = weight
        self.packed = packed

    @classmethod
    def of(cls, linear: nn.Linear, input: Tensor, packed: PackedWeights) -> FrozenProduct:
        weight = linear.weight.detach()
        key = (linear, "linear", input.size(0))
        if (
            weight.numel() < cls.WORTH_PACKING
            or not torch.backends.mkldnn.enabled
            or not torch.backends.mkldnn.is_available()
            or not packed.fits(key, lambda: 2 * weight.nbytes)
        ):
            return cls(weight, ())
        reorder = torch.ops.mkldnn._reorder_linear_weight

        def pack() -> tuple[Tensor, Tensor]:
            rows = input.size(0)
            return (
                reorder(weight.contiguous(), rows),
                reorder(weight.t().contiguous(), rows),
            )

        return cls(weight, packed.get(key, (linear.weight,), pack))

    def forward(self, input: Tensor, bias: Tensor | None) -> Tensor:
        if not self.packed:
            return F.linear(input, self.weight, bias)
        return self._product(input, self.packed[0], bias)

    def dgrad(self, grad: Tensor) -> Tensor:
        if not self.packed:
            return grad @ self.weight
        return self._product(grad, self.packed[1], None)

    @staticmethod
    def _product(input: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        pointwise = torch.ops.mkldnn._linear_pointwise
        return pointwise(input.contiguous(), packed, bias, "none", [], "")


class LinearAct(torch.autograd.Function):
    """dropout(relu(linear(input))); saves one bit an element."""

    @staticmethod
    def forward(ctx, input, bias, product, relu, p):
        output = product.forward(input, bias)
        mask = None
        if relu and p > 0.0:
            output, mask = ops.relu_dropout_mask(output, p)
        elif relu:
            output, mask = ops.relu_mask_(output)
        ctx.save_for_backward(mask)
        ctx.product, ctx.p = product, p
        return output

    @staticmethod
    @_first_order
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        need_input, need_bias = ctx.needs_input_grad[:2]
        grad = grad.contiguous()
        grad_bias = None
        if ctx.p > 0.0:
            grad = ops.apply_mask(grad, mask, 1.0 / (1.0 - ctx.p))
            mask = None
        if mask is not None or need_bias:
            masked_grad, grad_bias = ops.mask_bias_grad(grad, mask, mask is not None and need_input)
            grad = masked_grad if mask is not None else grad
        grad_input = ctx.product.dgrad(grad) if need_input else None
        return grad_input, grad_bias if need_bias else None, None, None, None


class Dropout(torch.autograd.Function):
    """Dropout that saves one bit an element; the same random numbers as stock's."""

    @staticmethod
    def forward(ctx, input, p):
        output, mask = ops.dropout_mask(input, p)
        ctx.save_for_backward(mask)
        ctx.p = p
        return output

    @staticmethod
    @_first_order
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return ops.apply_mask(grad.contiguous(), mask, 1.0 / (1.0 - ctx.p)), None
