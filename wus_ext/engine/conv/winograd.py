"""3x3 convolutions of stride 1 by Winograd's minimal filtering, on transformed weights.

The schemes and their cost are in :mod:`wus_ext.engine.conv.geometry`. What surrounds the
convolution in a chain is done while its tiles are in cache: an epilogue behind the forward pass, a
prologue in front of the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Act, Kind, activate, masked
from .algorithm import Algorithm, NormGrad, Trained
from .copies import Copies
from .geometry import Geometry, Scheme

ops = torch.ops.wus

# What wus::winograd_forward does behind the convolution, and wus::winograd_dgrad in front of it.
# Other activations are passes of their own.
EPILOGUES = {Act.NONE: 0, Act.RELU: 1, Act.RELU_POOL: 2}
STATISTICS = 3
PLAIN = 0
PROLOGUES = {Act.NONE: 1, Act.RELU: 2, Act(Kind.RELU6): 2, Act.RELU_POOL: 3}
NORM_PROLOGUES = {Act.NONE: 4, Act.RELU: 5, Act(Kind.RELU6): 5, Act.RELU_POOL: 6}


class Winograd(Algorithm):
    """3x3, stride 1, on weights that were transformed and packed before."""

    def __init__(
        self,
        geometry: Geometry,
        scheme: Scheme,
        copies: Copies,
    ) -> None:
        self.out_channels, self.in_channels = geometry.out_channels, geometry.in_channels
        self.geometry = geometry
        self.padding = geometry.padding[0]
        self.scheme = int(scheme)
        self.name = self.title(scheme)
        self.copies = copies

    @staticmethod
    def title(scheme: Scheme) -> str:
        """The name of the algorithm with this scheme."""
        return f"Winograd {scheme.name}"

    def forward(self, input: Tensor, bias: Tensor | None, act: Act) -> tuple[Tensor, Tensor | None]:
        if act not in EPILOGUES:
            return activate(self._convolve(input, bias, PLAIN)[0], act)
        output, mask = self._convolve(input, bias, EPILOGUES[act])
        return output, (None if act == Act.NONE else mask)

    def backward(
        self,
        grad: Tensor,
        mask: Tensor | None,
        act: Act,
        need_input: bool,
        need_bias: bool,
        trained: Trained | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad_weight = None
        if act not in PROLOGUES:
            return super().backward(grad, mask, act, need_input, need_bias, trained)
        if mask is not None and act.pool is None:
            mask = mask.view(grad.size(0), *self.geometry.output_size, -1)
        if trained is not None:
            grad_weight = self._weigh(grad, trained, mask, PROLOGUES[act])
        if not need_input:
            if mask is not None and act.pool is None:
                mask = mask.flatten(0, 2)
            _, grad_bias = masked(grad, mask, act, self.geometry.output_size, False, need_bias)
            return None, grad_bias, grad_weight
        if act == Act.NONE and not need_bias:
            return self.dgrad(grad), None, grad_weight
        return *self._deconvolve(grad, mask, PROLOGUES[act]), grad_weight

    def forward_stats(self, input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        output, statistics = self._convolve(input, bias, STATISTICS)
        return output, statistics[0], statistics[1]

    def dgrad(self, grad: Tensor) -> Tensor:
        return self._deconvolve(grad, None, PLAIN)[0]

    def wgrad(self, grad: Tensor, trained: Trained) -> Tensor:
        return self._weigh(grad, trained, None, PLAIN)

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
        grad_residual = None
        if need_residual:
            size = self.geometry.output_size
            passed, _ = masked(grad, mask, act, size, True, False)
            assert passed is not None
            grad_residual = grad = passed
            mask, act = None, Act.NONE
        elif act not in NORM_PROLOGUES:
            return super().backward_norm(grad, z, norm, mask, act, need_input, False, trained)
        elif mask is not None and act.pool is None:
            mask = mask.view(z.size(0), *self.geometry.output_size, -1)
        rest = mask, NORM_PROLOGUES[act], z, norm.rows[:3]
        return (
            self._deconvolve(grad, *rest)[0] if need_input else None,
            grad_residual,
            None if trained is None else self._weigh(grad, trained, *rest),
        )

    def _convolve(self, input: Tensor, bias: Tensor | None, epilogue: int) -> tuple[Tensor, Tensor]:
        packed = self.copies.forward()
        return ops.winograd_forward(
            input, packed, bias, self.out_channels, self.padding, self.scheme, epilogue
        )

    def _deconvolve(
        self,
        grad: Tensor,
        mask: Tensor | None,
        prologue: int,
        z: Tensor | None = None,
        coefficients: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return ops.winograd_dgrad(
            grad,
            self.copies.dgrad(),
            mask,
            self.in_channels,
            self.geometry.input_size,
            self.padding,
            self.scheme,
            prologue,
            z,
            coefficients,
        )

    def _weigh(
        self,
        grad: Tensor,
        trained: Trained,
        mask: Tensor | None,
        prologue: int,
        z: Tensor | None = None,
        coefficients: Tensor | None = None,
    ) -> Tensor:
        return ops.winograd_wgrad(
            grad,
            trained.input,
            mask,
            self.padding,
            self.scheme,
            prologue,
            z,
            coefficients,
            trained.weight.is_contiguous(memory_format=torch.channels_last),
        )
