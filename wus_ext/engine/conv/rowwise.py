"""Convolutions whose rows go in and out through what surrounds them, in a cache.

What stands behind the convolution (activation, statistics) is done to rows as they are made, and
what its backward makes of a gradient (activation, normalisation) as rows are read. Both gradients
are made in one pass over the output's.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from ..activation import Act, activate, masked
from .algorithm import Algorithm, NormGrad, Trained, through_norm


class Rowwise(Algorithm):
    """What such convolutions share; subclasses give the operators."""

    def forward(self, input: Tensor, bias: Tensor | None, act: Act) -> tuple[Tensor, Tensor | None]:
        if act.pool is not None:
            return activate(self._convolve(input, bias, Act.NONE)[0], act)
        output, saved = self._convolve(input, bias, act)
        return output, None if act == Act.NONE else saved

    def backward(
        self,
        grad: Tensor,
        mask: Tensor | None,
        act: Act,
        need_input: bool,
        need_bias: bool,
        trained: Trained | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if act.pool is not None:
            size, need_grad = self.geometry.output_size, need_input or trained is not None
            passed, grad_bias = masked(grad, mask, act, size, need_grad, need_bias)
            if passed is None or not need_grad:
                return None, grad_bias, None
            return self._plain(passed, need_input, grad_bias, trained)
        bits, z = (None, mask) if act.smooth else (mask, None)
        grads = self._gradients(grad, bits, z, None, act, need_input, need_bias, trained)
        return _wanted(grads, need_input, need_bias, trained)

    def dgrad(self, grad: Tensor) -> Tensor:
        return self._gradients(grad, None, None, None, Act.NONE, True, False, None)[0]

    def wgrad(self, grad: Tensor, trained: Trained) -> Tensor:
        return self._gradients(grad, None, None, None, Act.NONE, False, False, trained)[1]

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
        if act.pool is not None:
            grad_z, _ = through_norm(norm, grad, z, mask, act)
            return self._plain(grad_z, need_input, None, trained)
        grad_residual = None
        if need_residual:
            passed, _ = masked(grad, mask, act, self.geometry.output_size, True, False)
            assert passed is not None
            grad_residual = grad = passed
            mask, act = None, Act.NONE
        grads = self._gradients(grad, mask, z, norm.rows, act, need_input, False, trained)
        grad_input, _, grad_weight = _wanted(grads, need_input, False, trained)
        return grad_input, grad_residual, grad_weight

    def _plain(
        self, grad: Tensor, need_input: bool, grad_bias: Tensor | None, trained: Trained | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grads = self._gradients(grad, None, None, None, Act.NONE, need_input, False, trained)
        grad_input, _, grad_weight = _wanted(grads, need_input, False, trained)
        return grad_input, grad_bias, grad_weight

    @abstractmethod
    def _convolve(self, input: Tensor, bias: Tensor | None, act: Act) -> tuple[Tensor, Tensor]:
        """act(conv(input) + bias), and what backward needs: bits, or act's input."""

    @abstractmethod
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
        """Gradients of input, weight and bias, empty where not wanted, through act and norm."""


def _wanted(
    grads: tuple[Tensor, Tensor, Tensor],
    need_input: bool,
    need_bias: bool,
    trained: Trained | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, bias and weight."""
    grad_input, grad_weight, grad_bias = grads
    return (
        grad_input if need_input else None,
        grad_bias if need_bias else None,
        None if trained is None else grad_weight,
    )
