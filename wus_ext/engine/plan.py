"""What is known of a layer's call beforehand, from the kinds and shapes of what it is handed."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._build import chains
from .conv.choice import Library, library, only_library, pays_for_one_use
from .conv.geometry import Geometry
from .linear import only_torch
from .support import KERNELS, TYPES, on_gpu

__all__ = ["ConvPlan", "Key", "Plan", "plan_conv", "plan_linear", "why_not"]

#: What a layer's call depends on, besides its tensors' values.
Key = Hashable


@dataclass(slots=True)
class Plan:
    """How a layer's calls of one kind run.

    Attributes:
        sizes: of the output.
        dtype: of the output: the input's, or autocast's.
        library: the library's own layer, where there is no other to choose.
    """

    sizes: list[int]
    dtype: torch.dtype
    library: Library | None


@dataclass(slots=True)
class ConvPlan(Plan):
    """Of a convolution.

    Attributes:
        faster: than the library's own, without gradients and on a weight packed for this call.
    """

    geometry: Geometry
    faster: bool


def _fused_dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """The type in which a chain runs: that of all tensors or, where autocast casts them, its."""
    device = input.device.type
    types = TYPES.get(device, ())
    if input.dtype not in types or 0 in input.shape:
        return None
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else input.dtype
    if dtype not in types:
        return None
    for parameter in (weight, bias):
        if parameter is not None and not (
            parameter.device == input.device
            and parameter.dtype in types
            and (autocast or parameter.dtype == dtype)
            and type(parameter) in (Tensor, nn.Parameter)
            and 0 not in parameter.shape
        ):
            return None
    return dtype


def plan_conv(
    conv: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None, algo: str
) -> ConvPlan | None:
    dtype = _fused_dtype(input, weight, bias)
    if (
        dtype is None
        or input.dim() != 4
        or weight.dim() != 4
        or input.size(1) != weight.size(1) * conv.groups
        or weight.size(0) % conv.groups
        or conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        return None
    geometry = Geometry.of(conv, weight.shape, input.shape)
    if min(geometry.output_size) < 1:
        return None
    sizes = [input.size(0), weight.size(0), *geometry.output_size]
    gpu, single = on_gpu(weight), dtype == torch.float32
    faster = gpu or (single and pays_for_one_use(geometry, algo, input.size(0)))
    alone = only_library(geometry, algo, gpu, dtype)
    own = library(geometry, gpu, KERNELS) if alone else None
    return ConvPlan(sizes, dtype, own, geometry, faster)


def plan_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Plan | None:
    dtype = _fused_dtype(input, weight, bias)
    if (
        dtype is None
        or input.dim() != 2
        or weight.dim() != 2
        or input.size(1) != weight.size(1)
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        return None
    own = chains.Linear(KERNELS) if only_torch(weight, dtype) else None
    return Plan([input.size(0), weight.size(0)], dtype, own)


def why_not(layer: nn.Module, input: Tensor) -> str:
    """Why a layer's call does not run fused, in a few words."""
    if type(input) not in (Tensor, nn.Parameter):
        return f"its input is a {type(input).__name__}"
    types = TYPES.get(input.device.type, ())
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    if dtype not in types:
        return f"{str(dtype).removeprefix('torch.')} on {device} has no fused form"
    dims = 4 if isinstance(layer, nn.Conv2d) else 2
    if input.dim() != dims:
        return f"an input of {input.dim()} dimensions has no fused form"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={layer.padding_mode!r} has no fused form"
    if isinstance(getattr(layer, "padding", None), str):
        return f"padding={layer.padding!r} has no fused form"
    if not torch.is_grad_enabled():
        return "too few values to gain without gradients"
    return "its weight trains, or its shapes or types do not fit"
