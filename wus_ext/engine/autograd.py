"""Linear layers' chains on products of ours, and dropout: what is saved, what backward computes.

Convolutions' chains, and linear layers' on torch's products, are in ``csrc/chains``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._build import deferral
from .activation import Act, activate, masked
from .linear import Products
from .support import is_batched

ops = torch.ops.wus


def first_order(
    backward: Callable[[Any, Tensor], tuple[Tensor | None, ...]],
) -> Callable[[Any, Tensor | None], tuple[Tensor | None, ...]]:
    """A backward of one gradient without a derivative of its own says so, whatever was asked.

    Of a gradient that there is not, it makes none.
    """

    @wraps(backward)
    def checked(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a fused step, and one through fused layers whose weights are at "
                "requires_grad=False, has no second derivative (create_graph=True); "
                "convert the model with fuse=False and full='stock'"
            )
        return (None,) * len(ctx.needs_input_grad) if grad is None else backward(ctx, grad)

    return checked


def to_save(
    ctx: Any, input: Tensor, index: int, weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What the weight's gradient needs, where the weight, argument `index`, trains."""
    return (input, weight) if ctx.needs_input_grad[index] else ()


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
        ctx.set_materialize_grads(False)
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
        ctx.set_materialize_grads(False)
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
