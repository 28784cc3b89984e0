"""Chains of layers that run as one and save masks, not activations.

Where a chain's weight trains (options.full), its input is saved too. A chain is handed what its
layers were called with, tensors and numbers, and reads nothing of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from .._build import chains, deferral
from ..nn import SkipLayer
from .activation import Act, Kind
from .autograd import LinearAct, Norm
from .conv.algorithm import Algorithm
from .conv.choice import choose
from .conv.measure import Measured
from .conv.weight import Weight
from .linear import Products
from .options import SkipOptions
from .packed_weights import PackedWeights
from .plan import ConvPlan, Plan
from .support import KERNELS, single, takes

ops = torch.ops.wus


@dataclass(slots=True)
class Notes:
    """What layers did.

    Attributes:
        algorithms: by which their chains ran.
        reasons: why they ran by themselves.
    """

    algorithms: dict[nn.Module, str] = field(default_factory=dict)
    reasons: dict[nn.Module, str] = field(default_factory=dict)


class Resources(Protocol):
    """What chains use of a converted model's engine."""

    options: SkipOptions
    packed: PackedWeights
    measured: Measured
    notes: Notes | None


def run_conv(
    engine: Resources,
    conv: nn.Module,
    plan: ConvPlan,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_trains: bool,
    norm: Norm | None,
    residual: Tensor | None,
    act: Act,
) -> Tensor:
    """conv [+ batch norm] [+ residual] [+ activation] [+ max-pool], in channels_last.

    Args:
        weight_trains: whether the weight gets a gradient; else it is a constant.
    """
    input = chains.entered(input.to(plan.dtype), deferral.suggests_channels_last(weight))
    if residual is not None:
        residual = chains.entered(residual, False)
    trained = weight if weight_trains else None
    own = Weight(conv, weight.detach(), (weight,), weight_trains)
    images = input.size(0)
    if not weight_trains and torch.is_grad_enabled():
        engine.packed.saves(conv, weight, saved_by(act, plan.sizes, plan.dtype))

    def algorithm(weight: Weight, backward: bool) -> Algorithm:
        geometry, options = plan.geometry, engine.options
        chosen = choose(
            weight,
            geometry,
            options,
            engine.packed,
            engine.measured,
            images,
            backward,
            plan.dtype,
        )
        if engine.notes is not None:
            engine.notes.algorithms[conv] = chosen.name
        return chosen

    if norm is not None and norm.batch:
        chosen = algorithm(own, wants_dgrad(input))
        return chains.chained(chosen, input, bias, trained, norm, residual, act)
    if norm is not None and weight_trains:  # folding would be for this call only
        chosen = algorithm(own, False)
        return normalised(chosen.forward(input, bias, Act.NONE)[0], norm, residual, act)
    if norm is not None:
        own, bias = folded(own, bias, norm)
    chosen = algorithm(own, wants_dgrad(input))
    return chains.chained(chosen, input, bias, trained, None, residual, act)


def resume(image: Tensor, norm: Norm | None, residual: Tensor | None, act: Act) -> Tensor | None:
    """What follows a convolution, for an output that has been computed by itself.

    Returns:
        The output, or None where the layers must run one by one.
    """
    if (
        not takes(image)
        or image.dim() != 4
        or not image.is_contiguous(memory_format=torch.channels_last)
        or (norm is None and act == Act.NONE)
        or (norm is not None and not norm.batch)
    ):
        return None
    if residual is not None:
        residual = chains.entered(residual, False)
    return chains.resumed(image, norm, residual, act, KERNELS)


def run_linear(
    engine: Resources,
    linear: SkipLayer,
    plan: Plan,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_trains: bool,
    act: Act,
    noise: Tensor | None,
    p: float,
) -> Tensor:
    """linear [+ activation], or linear + ReLU + dropout.

    Args:
        noise: of dropout: 1 where a value is kept, else 0.
    """
    input = input.to(plan.dtype)
    if weight_trains:
        product = Products.training(linear, weight, input.dtype)
        return LinearAct.apply(input, bias, weight, product, act, noise, p)
    if torch.is_grad_enabled():
        engine.packed.saves(linear, weight, saved_by(act, plan.sizes, plan.dtype))
    product = Products.frozen(linear, weight, input, engine.packed, wants_dgrad(input))
    return LinearAct.apply(input, bias, None, product, act, noise, p)


def wants_dgrad(input: Tensor) -> bool:
    """Whether backward will be asked for the gradient of `input`."""
    return input.requires_grad and torch.is_grad_enabled()


def saved_by(act: Act, sizes: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that stock saves of an activation, and a chain does not: its output, for the next.

    Args:
        sizes: of the activation's output, in front of a pool.
    """
    if act.kind == Kind.NONE:
        return 0
    elements = math.prod(sizes)
    if act.pool is None:
        return elements * dtype.itemsize - (elements // 8 if act.kind.bits else 0)
    # Of a pool stock saves indices of 8 bytes, a chain codes of one.
    return elements * dtype.itemsize + elements // act.pool.stride**2 * 7


def normalised(image: Tensor, norm: Norm, residual: Tensor | None, act: Act) -> Tensor:
    """act(norm(image) + residual) with running statistics and without gradients."""
    scale, shift, _ = ops.batch_norm_scale_shift(
        single(norm.running_mean),
        single(norm.running_var),
        single(norm.weight),
        single(norm.bias),
        norm.eps,
    )
    return ops.batch_norm_apply(image, scale, shift, residual, *act.arguments, need_mask=False)[0]


def folded(weight: Weight, bias: Tensor | None, norm: Norm) -> tuple[Weight, Tensor]:
    """A normalisation with running statistics as part of its convolution.

    Returns:
        The scaled weight, and the bias, through which the gradients of both layers' biases flow.
    """

    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None

    def scale() -> Tensor:
        inverse = torch.rsqrt(var.float() + norm.eps)
        return inverse if norm.weight is None else inverse * norm.weight.detach().float()

    # Batch norm writes running statistics past their version counters; the count of batches tells.
    made_of = (*weight.sources, var, norm.batches, norm.weight)
    sources = tuple(tensor for tensor in made_of if tensor is not None)
    shift = -mean.float() if bias is None else bias.float() - mean.float()
    shift = shift * scale()
    if norm.bias is not None:
        shift = shift + norm.bias

    def make() -> Tensor:
        return weight.own * scale()[:, None, None, None]

    return weight._replace(sources=sources, folded=make), shift
