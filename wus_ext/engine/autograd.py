"""What the fused chains save for backward, and what their backward computes.

Autograd functions over the C++ kernels; images are channels_last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._build import deferral
from .activation import Act, activate, masked
from .conv.algorithm import Algorithm, NormGrad, Trained
from .linear import Products
from .support import dense, is_batched, single

ops = torch.ops.wus

Gradients = TypeVar("Gradients")


def first_order(backward: Callable[[Any, Tensor], Gradients]) -> Callable[[Any, Tensor], Gradients]:
    """A backward of one gradient without a derivative of its own says so, whatever was asked."""

    @wraps(backward)
    def checked(ctx: Any, grad: Tensor) -> Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a fused step, and one through fused layers whose weights are at "
                "requires_grad=False, has no second derivative (create_graph=True); "
                "convert the model with fuse=False and full='stock'"
            )
        return backward(ctx, grad)

    return checked


def to_save(
    ctx: Any, input: Tensor, index: int, weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What the weight's gradient needs, where the weight, argument `index`, trains."""
    return (input, weight) if ctx.needs_input_grad[index] else ()


class Enter(torch.autograd.Function):
    """An image in channels_last, for a chain whose input's gradient stock gives contiguous."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class ConvAct(torch.autograd.Function):
    """act(conv(input) + bias); saves the mask, and the input where the weight trains."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        algorithm: Algorithm,
        act: Act,
    ) -> Tensor:
        output, mask = algorithm.forward(input, bias, act)
        ctx.save_for_backward(mask, *to_save(ctx, input, 2, weight))
        ctx.algorithm, ctx.act = algorithm, act
        return output

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, *trained = ctx.saved_tensors
        need_input, need_bias = ctx.needs_input_grad[:2]
        grad_input, grad_bias, grad_weight = ctx.algorithm.backward(
            dense(grad),
            mask,
            ctx.act,
            need_input,
            need_bias,
            Trained(*trained) if trained else None,
        )
        return grad_input, grad_bias if need_bias else None, grad_weight, None, None


class ConvAddAct(torch.autograd.Function):
    """act(conv(input) + bias + residual); saves the mask, and the input where the weight trains."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        residual: Tensor,
        algorithm: Algorithm,
        act: Act,
    ) -> Tensor:
        output, mask = algorithm.forward_add(input, bias, residual, act)
        ctx.save_for_backward(mask, *to_save(ctx, input, 2, weight))
        ctx.algorithm, ctx.act = algorithm, act
        return output

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, *trained = ctx.saved_tensors
        need_input, need_bias, need_weight, need_residual = ctx.needs_input_grad[:4]
        algorithm = ctx.algorithm
        size = (grad.size(2), grad.size(3))
        need_grad = need_input or need_weight or need_residual
        passed, grad_bias = masked(dense(grad), mask, ctx.act, size, need_grad, need_bias)
        return (
            algorithm.dgrad(passed) if need_input else None,
            grad_bias if need_bias else None,
            algorithm.wgrad(passed, Trained(*trained)) if need_weight else None,
            passed if need_residual else None,
            None,
            None,
        )


class Norm(NamedTuple):
    """Batch norm as ``F.batch_norm`` was handed it.

    Attributes:
        batches: how many the running statistics have seen, which tells that they have changed.
        constant: the weight stands still.
        batch: normalises with the batch's statistics, which the running ones follow.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None
    constant: bool
    batch: bool
    momentum: float
    eps: float

    def single(self) -> Norm:
        """With weight and bias in float32."""
        return self._replace(weight=single(self.weight), bias=single(self.bias))

    def update(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Moves the running statistics towards a batch's."""
        if self.running_mean is None or self.running_var is None:
            return
        running_mean, running_var = single(self.running_mean), single(self.running_var)
        ops.batch_norm_update_running(running_mean, running_var, mean, var, self.momentum, count)
        if running_mean is not self.running_mean:
            self.running_mean.copy_(running_mean)
            self.running_var.copy_(running_var)


class ConvNormAct(torch.autograd.Function):
    """act(batch_norm(conv(input) + bias) + residual) with batch statistics.

    Saves the mask; the convolution's output, which the statistics' gradient needs, where the
    gradient goes on to the input, the weight or gamma, or where the activation's slope follows from
    it; and the input where the weight trains. A bias in front of batch statistics has no influence:
    its gradient is exactly zero, or NaN where the numbers that it would be summed from are not
    finite.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        algorithm: Algorithm,
        norm: Norm,
        act: Act,
    ) -> Tensor:
        z, mean, var = algorithm.forward_stats(input, bias)
        count = z.numel() // z.size(1)
        seen = mean if bias is None or algorithm.adds_bias else mean + bias
        norm.update(seen, var, count)
        scale, shift, invstd = ops.batch_norm_scale_shift(mean, var, gamma, beta, norm.eps)
        output, mask = ops.batch_norm_apply(z, scale, shift, residual, *act.arguments)
        mask = None if act == Act.NONE or act.smooth else mask
        need_input, _, need_weight, need_gamma = ctx.needs_input_grad[:4]
        affine = (scale, shift) if act.smooth else (None, None)
        keep = need_input or need_weight or need_gamma or act.smooth
        kept = (z, mean, invstd, gamma, *affine) if keep else ()
        ctx.save_for_backward(mask, *kept, *to_save(ctx, input, 2, weight))
        ctx.algorithm, ctx.act, ctx.count = algorithm, act, count
        ctx.size = tuple(z.shape[2:])
        return output

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, *kept = ctx.saved_tensors
        need_input, need_bias, need_weight, need_gamma, need_beta, need_residual = (
            ctx.needs_input_grad[:6]
        )
        act, algorithm = ctx.act, ctx.algorithm
        grad = dense(grad)
        if not kept:
            need_sums = need_beta or need_bias
            passed, sums = masked(grad, mask, act, ctx.size, need_residual, need_sums)
            grad_bias = sums * 0 if need_bias and sums is not None else None
            grad_beta = sums if need_beta else None
            grad_residual = passed if need_residual else None
            return None, grad_bias, None, None, grad_beta, grad_residual, None, None, None
        z, mean, invstd, gamma, scale, shift, *trained = kept
        sums = ops.batch_norm_grad_sums(grad, z, mean, mask, scale, shift, *act.arguments)
        a, b, c, grad_beta, grad_gamma = ops.batch_norm_grad_coefficients(
            *sums, mean, invstd, gamma, ctx.count
        )
        grad_bias = c * 0 if need_bias else None
        grad_input = grad_weight = grad_residual = None
        if need_input or need_weight or need_residual:
            grad_input, grad_residual, grad_weight = algorithm.backward_norm(
                grad,
                z,
                NormGrad(a, b, c, scale, shift),
                mask,
                act,
                need_input,
                need_residual,
                Trained(*trained) if trained else None,
            )
        return (
            grad_input,
            grad_bias,
            grad_weight,
            grad_gamma if need_gamma else None,
            grad_beta if need_beta else None,
            grad_residual if need_residual else None,
            None,
            None,
            None,
        )


class LinearAct(torch.autograd.Function):
    """dropout(act(linear(input))); saves bits or act's input, and the input for the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        product: Products,
        act: Act,
        noise: Tensor | None,
        p: float,
    ) -> Tensor:
        output = product.forward(input, bias)
        if noise is None:
            output, mask = activate(output, act)
        else:  # of dropout, whose activation is ReLU
            output, mask = ops.relu_dropout_mask(output, p, noise=noise)
        ctx.save_for_backward(mask, *to_save(ctx, input, 2, weight))
        ctx.product, ctx.act, ctx.p = product, act, p
        return output

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, *trained = ctx.saved_tensors
        need_input, need_bias, need_weight = ctx.needs_input_grad[:3]
        need_grad = need_input or need_weight
        grad, act = grad.contiguous(), ctx.act
        if ctx.p > 0.0:
            grad, mask, act = ops.apply_mask(grad, mask, 1.0 / (1.0 - ctx.p)), None, Act.NONE
        passed, grad_bias = masked(grad, mask, act, (1, 1), need_grad, need_bias)
        return (
            ctx.product.dgrad(passed) if need_input else None,
            grad_bias if need_bias else None,
            ctx.product.wgrad(passed, trained[0]) if need_weight else None,
            None,
            None,
            None,
            None,
        )


class Dropout(torch.autograd.Function):
    """Dropout that saves one bit an element; on the CPU the same random numbers as stock's."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float) -> Tensor:
        # In two dimensions, which the kernels do not turn into channels_last.
        ctx.flat = input.dim() == 4 and input.is_contiguous()
        output, mask = ops.dropout_mask(input.flatten(1) if ctx.flat else input, p)
        ctx.save_for_backward(mask)
        ctx.p = p
        return output.view(input.shape) if ctx.flat else output

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        scale = 1.0 / (1.0 - ctx.p)
        if not ctx.flat:
            return ops.apply_mask(grad, mask, scale), None
        grad_input = ops.apply_mask(grad.flatten(1), mask, scale).view(grad.shape)
        # Stock's product has the layout of the output's gradient.
        if not is_batched(grad) and deferral.suggests_channels_last(grad):
            grad_input = grad_input.contiguous(memory_format=torch.channels_last)
        return grad_input, None
