"""Chains whose ReLU is undone by the chain above, together with its data gradient.

Where exactly one chain takes the output of another, nobody else sees the gradient between the two.
The lower chain may then leave the mask of its ReLU and the gradient of its bias to the upper one,
where a library can do both in the product that makes the gradient. Where none can, they follow as
the pass that they are in an unlinked chain, with the same results bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..activation import Act, masked
from ..autograd import first_order, linear_forward, linear_masked
from ..conv.algorithm import Unfused
from ..linear import Products
from ..support import dense, on_gpu, tf32_products
from . import conv_epilogue

ops = torch.ops.wus


@dataclass(frozen=True)
class Held:
    """A ReLU's output on its way to the one chain that takes it.

    Attributes:
        output: its gradient is expected to be masked already.
        mask: of the ReLU.
        bias: in front of the ReLU; its gradient, too, is left to whoever takes the output.
        opaque: the mask is cuBLASLt's, good for ``wus::linear_drelu_bgrad`` only.
    """

    output: Tensor
    mask: Tensor
    bias: Tensor | None
    opaque: bool = False

    def wants_grad(self) -> bool:
        """Whether backward will be asked for the gradient of the output or of the bias."""
        tensors = (self.output, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def settled(self) -> Tensor:
        """The output as any tensor: what was left to do follows as a pass of its own."""
        mask = ops.activate(self.output)[1] if self.opaque else self.mask
        return _Settled.apply(self.output, mask, self.bias)


class Layer(Protocol):
    """What a linked chain runs."""

    opaque: bool  # of the mask that forward gives

    def forward(
        self, input: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The chain's output, and its mask."""

    def masked(
        self, grad: Tensor, mask: Tensor | None, need_grad: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient in front of the activation, and the bias's."""

    def dgrad(self, grad: Tensor) -> Tensor:
        """The gradient of the input."""

    def dgrad_relu(self, grad: Tensor, mask: Tensor, need_input: bool) -> tuple[Tensor, Tensor]:
        """The gradient of the input behind a mask, and its sum over all but the channels.

        The first is of no use where it is not needed.
        """


@dataclass
class ConvLayer:
    """act(conv(input) + bias [+ residual]).

    Attributes:
        cudnn: whether cuDNN's kernel for all of dgrad_relu may be used.
    """

    algorithm: Unfused
    act: Act
    cudnn: bool = False
    opaque: bool = False

    def forward(
        self, input: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if residual is None:
            return self.algorithm.forward(input, bias, self.act)
        return self.algorithm.forward_add(input, bias, residual, self.act)

    def masked(
        self, grad: Tensor, mask: Tensor | None, need_grad: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        size = self.algorithm.geometry.output_size
        return masked(dense(grad), mask, self.act, size, need_grad, need_bias)

    def dgrad(self, grad: Tensor) -> Tensor:
        return self.algorithm.dgrad(grad)

    def dgrad_relu(self, grad: Tensor, mask: Tensor, need_input: bool) -> tuple[Tensor, Tensor]:
        grad, algorithm = dense(grad), self.algorithm

        def two_passes() -> tuple[Tensor, Tensor]:
            return _two_passes(algorithm, grad, mask, need_input)

        if not (self.cudnn and need_input and conv_epilogue.suits(algorithm, grad)):
            return two_passes()
        return conv_epilogue.dgrad_relu(algorithm, grad, mask, two_passes)


@dataclass
class LinearLayer:
    """dropout(act(linear(input))).

    Attributes:
        opaque: forward is cuBLASLt's, bias, ReLU and mask included.
        below_opaque: the mask of the layer below is cuBLASLt's.
        noise: of dropout.
        tf32: whether cuBLASLt may use TF32, as the forward pass found it: backward must not meet a
            setting for which there is no product.
    """

    product: Products
    act: Act
    p: float
    opaque: bool
    below_opaque: bool
    noise: Tensor | None = None
    tf32: bool = field(default_factory=tf32_products)

    def forward(
        self, input: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not self.opaque:
            return linear_forward(self.product, input, bias, self.act, self.noise, self.p)
        assert bias is not None
        weight = self.product.weight
        return ops.linear_relu_aux(input, weight, bias.to(input.dtype), self.tf32)

    def masked(
        self, grad: Tensor, mask: Tensor | None, need_grad: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        return linear_masked(grad, mask, self.act, self.p, need_grad, need_bias)

    def dgrad(self, grad: Tensor) -> Tensor:
        return self.product.dgrad(grad)

    def dgrad_relu(self, grad: Tensor, mask: Tensor, need_input: bool) -> tuple[Tensor, Tensor]:
        if not self.below_opaque:
            return _two_passes(self.product, grad, mask, need_input)
        return ops.linear_drelu_bgrad(grad, self.product.weight, mask, self.tf32)


def suits_cublaslt(input: Tensor, features: int, features_above: int) -> bool:
    """Whether cuBLASLt has the products of a layer and of the one above it on [N, *] `input`."""
    if not on_gpu(input):
        return False
    return ops.linear_epilogues_exist(input, features, features_above, tf32_products())


def _two_passes(
    layer: Unfused | Products, grad: Tensor, mask: Tensor, need_input: bool
) -> tuple[Tensor, Tensor]:
    return ops.activate_grad(layer.dgrad(grad), mask, need_grad_input=need_input)


def linked(
    layer: Layer,
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    below: Held | None,
    hold: bool,
) -> Tensor | Held:
    """Runs a chain's layer.

    Args:
        below: what `input` is the output of, if its gradient is to be masked here.
        hold: whether the chain's own ReLU is left to the chain above.
    """
    own_bias = bias.detach() if hold and bias is not None else bias
    mask, bias_below = (None, None) if below is None else (below.mask, below.bias)
    held: list[Tensor] | None = [] if hold else None
    output = _Linked.apply(input, own_bias, residual, mask, bias_below, layer, held)
    return output if held is None else Held(output, held[0], bias, layer.opaque)


class _Linked(torch.autograd.Function):
    """A layer; saves the mask of the layer below, and its own, which goes to `held` instead if
    that is a list: for a second output backward would make a gradient of zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        mask_below: Tensor | None,
        bias_below: Tensor | None,
        layer: Layer,
        held: list[Tensor | None] | None,
    ) -> Tensor:
        output, mask = layer.forward(input, bias, residual)
        ctx.layer, ctx.hold = layer, held is not None
        if held is not None:
            held.append(mask)
        ctx.save_for_backward(None if ctx.hold else mask, mask_below)
        return output

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, mask_below = ctx.saved_tensors
        need_input, need_bias, need_residual, _, need_below, *_ = ctx.needs_input_grad
        layer = ctx.layer
        grad_bias = grad_input = grad_below = None
        need_dgrad = need_input or need_below
        if not ctx.hold:
            grad, grad_bias = layer.masked(grad, mask, need_dgrad or need_residual, need_bias)
        if need_dgrad and mask_below is not None:
            grad_input, grad_below = layer.dgrad_relu(grad, mask_below, need_input)
        elif need_dgrad:
            grad_input = layer.dgrad(grad)
        return (
            grad_input if need_input else None,
            grad_bias if need_bias else None,
            grad if need_residual else None,
            None,
            grad_below if need_below else None,
            None,
            None,
        )


class _Settled(torch.autograd.Function):
    """The output itself; backward masks its gradient and sums it for the bias."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        return output.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        need_output, _, need_bias = ctx.needs_input_grad
        grad_output, grad_bias = ops.activate_grad(grad, mask, need_grad_input=need_output)
        return grad_output if need_output else None, None, grad_bias if need_bias else None
