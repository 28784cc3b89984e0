"""The full step with the skip step's convolutions: what a faster convolution alone would gain.

Forward and data gradient run on the same Winograd kernels, with weights transformed anew in each
step because they change; the weight gradient is oneDNN's.
"""

from __future__ import annotations

import torch
from torch import nn

from wus_ext.algorithms import Act, Direct, choose
from wus_ext.geometry import Geometry
from wus_ext.options import SkipOptions
from wus_ext.packing import PackedWeights


class _FastConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, conv, options):
        geometry = Geometry.of(conv, input)
        algorithm = choose(conv, geometry, weight.detach, (weight,), options, PackedWeights())
        ctx.save_for_backward(input, weight)
        ctx.algorithm, ctx.conv, ctx.has_bias = algorithm, conv, bias is not None
        return algorithm.forward(input, bias, Act.NONE)[0]

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        conv = ctx.conv
        grad = grad.contiguous(memory_format=torch.channels_last)
        direct = isinstance(ctx.algorithm, Direct)
        mask = (direct and ctx.needs_input_grad[0], True, ctx.has_bias)
        grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            input,
            weight,
            [weight.size(0)],
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            [0, 0],
            conv.groups,
            mask,
        )
        if not direct and ctx.needs_input_grad[0]:
            grad_input = ctx.algorithm.dgrad(grad)
        return grad_input, grad_weight, grad_bias, None, None


class FastConv2d(nn.Conv2d):
    """A convolution whose full step uses the skip step's forward pass and data gradient."""

    options = SkipOptions()

    def _conv_forward(self, input, weight, bias):
        input = input.contiguous(memory_format=torch.channels_last)
        return _FastConv.apply(input, weight, bias, self, self.options)


def accelerate(model: nn.Module) -> nn.Module:
    """Gives every stock convolution of a model the fast full step."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = FastConv2d
    return model
