"""Convolutions and linear with a skip flag, and what torch.compile must know of the operators.

Without the flag these are ``torch.nn.functional``'s own. With it the weight is a constant: backward
computes the input and bias gradients only, and neither the input nor anything else that only the
weight gradient needs is saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _build  # noqa: F401  (registers torch.ops.wus)
from ._torch import in_a_transform

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "linear",
    "pad",
]

Sizes = int | Sequence[int]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    skip_wgrad: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.conv2d` that can leave the weight gradient out.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``; any floating dtype, layout and device that stock
            ``conv2d`` takes.
        weight: ``(K, C / groups, R, S)``.
        bias: ``(K,)`` or None.
        stride, padding, dilation, groups: as stock, ``padding="same"`` and ``"valid"`` included.
        skip_wgrad: if True, backward computes the gradients of ``input`` and ``bias`` only; the
            weight is saved and the input is not. Default False: stock, bit for bit.

    Returns:
        ``(N, K, P, Q)`` or ``(K, P, Q)``, in stock's dtype and layout.

    Raises:
        ValueError: if ``skip_wgrad`` meets a ``padding`` that stock refuses.
        RuntimeError: where stock raises it (shapes and dtypes that do not fit).

    Example:
        >>> x = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> w = torch.randn(4, 3, 3, 3, requires_grad=True)
        >>> b = torch.zeros(4, requires_grad=True)
        >>> wus_ext.functional.conv2d(x, w, b, padding=1, skip_wgrad=True).sum().backward()
        >>> x.grad.shape, b.grad.shape, w.grad
        (torch.Size([2, 3, 8, 8]), torch.Size([4]), None)
    """
    if not skip_wgrad:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _convolution(2, input, weight, bias, stride, padding, dilation, groups)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    skip_wgrad: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.conv1d` that can leave the weight gradient out.

    As :func:`conv2d`, with one size after the channels: ``(N, C, L)`` or ``(C, L)``, and a weight
    of ``(K, C / groups, R)``.

    Example:
        >>> x, w = torch.randn(2, 3, 8, requires_grad=True), torch.randn(4, 3, 3)
        >>> wus_ext.functional.conv1d(x, w, padding="same", skip_wgrad=True).shape
        torch.Size([2, 4, 8])
    """
    if not skip_wgrad:
        return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    return _convolution(1, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    skip_wgrad: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.conv3d` that can leave the weight gradient out.

    As :func:`conv2d`, with three sizes after the channels: ``(N, C, D, H, W)`` or
    ``(C, D, H, W)``, and a weight of ``(K, C / groups, Q, R, S)``.

    Example:
        >>> x, w = torch.randn(1, 2, 4, 6, 6), torch.randn(4, 2, 3, 3, 3)
        >>> wus_ext.functional.conv3d(x, w, stride=(1, 2, 2), skip_wgrad=True).shape
        torch.Size([1, 4, 2, 2, 2])
    """
    if not skip_wgrad:
        return F.conv3d(input, weight, bias, stride, padding, dilation, groups)
    return _convolution(3, input, weight, bias, stride, padding, dilation, groups)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    skip_wgrad: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.conv_transpose1d` that can leave the weight gradient out.

    As :func:`conv_transpose2d`, with one size after the channels: ``(N, C, L)`` or ``(C, L)``, and
    a weight of ``(C, K / groups, R)``.
    """
    if not skip_wgrad:
        return F.conv_transpose1d(
            input, weight, bias, stride, padding, output_padding, groups, dilation
        )
    return _convolution(1, input, weight, bias, stride, padding, dilation, groups, output_padding)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    skip_wgrad: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.conv_transpose2d` that can leave the weight gradient out.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``; any floating dtype, layout and device.
        weight: ``(C, K / groups, R, S)``.
        bias: ``(K,)`` or None.
        stride, padding, output_padding, groups, dilation: as stock, and in stock's order.
        skip_wgrad: if True, backward computes the gradients of ``input`` and ``bias`` only; the
            weight is saved and the input is not. Default False: stock, bit for bit.

    Returns:
        ``(N, K, P, Q)`` or ``(K, P, Q)``.

    Raises:
        ValueError, RuntimeError: as :func:`conv2d`.

    Example:
        >>> x = torch.randn(2, 3, 4, 4, requires_grad=True)
        >>> w = torch.randn(3, 5, 2, 2, requires_grad=True)
        >>> y = wus_ext.functional.conv_transpose2d(x, w, stride=2, skip_wgrad=True)
        >>> y.sum().backward()
        >>> y.shape, x.grad.shape, w.grad
        (torch.Size([2, 5, 8, 8]), torch.Size([2, 3, 4, 4]), None)
    """
    if not skip_wgrad:
        return F.conv_transpose2d(
            input, weight, bias, stride, padding, output_padding, groups, dilation
        )
    return _convolution(2, input, weight, bias, stride, padding, dilation, groups, output_padding)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    skip_wgrad: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.conv_transpose3d` that can leave the weight gradient out.

    As :func:`conv_transpose2d`, with three sizes after the channels: ``(N, C, D, H, W)`` or
    ``(C, D, H, W)``, and a weight of ``(C, K / groups, Q, R, S)``.
    """
    if not skip_wgrad:
        return F.conv_transpose3d(
            input, weight, bias, stride, padding, output_padding, groups, dilation
        )
    return _convolution(3, input, weight, bias, stride, padding, dilation, groups, output_padding)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, skip_wgrad: bool = False
) -> Tensor:
    """:func:`torch.nn.functional.linear` that can leave the weight gradient out.

    Args:
        input: ``(..., in_features)``; any floating dtype and device.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        skip_wgrad: if True, backward computes the gradients of ``input`` and ``bias`` only.
            Default False: stock, bit for bit.

    Returns:
        ``(..., out_features)``.

    Raises:
        RuntimeError: where stock raises it (shapes and dtypes that do not fit).

    Example:
        >>> x, w = torch.randn(5, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
        >>> wus_ext.functional.linear(x, w, skip_wgrad=True).sum().backward()
        >>> x.grad.shape, w.grad
        (torch.Size([5, 3]), None)
    """
    if not skip_wgrad:
        return F.linear(input, weight, bias)
    if _transformed():
        return F.linear(input, weight.detach(), bias)
    return torch.ops.wus.linear(input, weight, bias)


def _transformed() -> bool:
    """Whether stock's operators must run, on a constant: ours are not known to torch.func."""
    return not torch.compiler.is_compiling() and in_a_transform()


def _convolution(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    groups: int,
    output_padding: Sizes | None = None,
) -> Tensor:
    """A convolution over a constant weight; transposed where it has an output padding."""
    if weight.dim() != dims + 2 or input.dim() not in (dims + 1, dims + 2):
        raise RuntimeError(  # as stock
            f"input and weight: expected {dims + 1} or {dims + 2} dimensions (without and with a "
            f"batch) and {dims + 2}, got shapes {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    stride = _numbers("stride", stride, dims)
    dilation = _numbers("dilation", dilation, dims)
    if isinstance(padding, str):
        input, padding = _resolve_padding(input, weight, padding, stride, dilation)
    padding = _numbers("padding", padding, dims)
    transposed = output_padding is not None
    left_over = _numbers("output_padding", output_padding or 0, dims)
    if _transformed():
        operands = (input, weight.detach(), bias, stride, padding)
        if transposed:
            return getattr(F, f"conv_transpose{dims}d")(*operands, left_over, groups, dilation)
        return getattr(F, f"conv{dims}d")(*operands, dilation, groups)
    numbers = (stride, padding, dilation, transposed, left_over, groups)
    if input.dim() == dims + 1:
        return torch.ops.wus.convolution(input.unsqueeze(0), weight, bias, *numbers).squeeze(0)
    return torch.ops.wus.convolution(input, weight, bias, *numbers)


def pad(input: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """:func:`torch.nn.functional.pad` that saves nothing for backward.

    Stock's reflect and replicate padding save their input; here the border is copied together from
    slices, whose backward needs sizes only.

    Args:
        input: ``(..., W)``, ``(..., H, W)`` or ``(..., D, H, W)``.
        padding: pixels before and after, last dimension first: ``(left, right, top, bottom)`` for
            two dimensions; none negative.
        mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Returns:
        ``input`` with its last ``len(padding) / 2`` dimensions wider.

    Raises:
        ValueError: for another mode, or a border wider than the mode can fill.
    """
    if mode == "zeros":
        return F.pad(input, tuple(padding))
    channels_last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    padded = input
    for dim in reversed(range(len(padding) // 2)):
        before, after = padding[2 * dim : 2 * dim + 2]
        padded = _pad_dim(padded, -1 - dim, before, after, mode)
    return padded.contiguous(memory_format=torch.channels_last) if channels_last else padded


def _pad_dim(input: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    if before == 0 and after == 0:
        return input
    size = input.size(dim)
    widest = {"reflect": size - 1, "circular": size}.get(mode)
    if widest is not None and max(before, after) > widest:
        raise ValueError(
            f"padding: {mode} fills a border of at most {widest} pixels for an input of size "
            f"{size}, but {max(before, after)} were asked for"
        )
    if mode == "reflect":
        first = input.narrow(dim, 1, before).flip(dim)
        last = input.narrow(dim, size - 1 - after, after).flip(dim)
    elif mode == "circular":
        first = input.narrow(dim, size - before, before)
        last = input.narrow(dim, 0, after)
    elif mode == "replicate":
        first = input.narrow(dim, 0, 1).repeat_interleave(before, dim)
        last = input.narrow(dim, size - 1, 1).repeat_interleave(after, dim)
    else:
        raise ValueError(
            f"mode: {mode!r} is not one of 'zeros', 'reflect', 'replicate', 'circular'"
        )
    return torch.cat((first, input, last), dim)


def _numbers(name: str, value: Sizes, dims: int) -> tuple[int, ...]:
    if isinstance(value, int | torch.SymInt):
        return (value,) * dims
    values = tuple(value)
    if len(values) == 1:
        values *= dims
    if len(values) != dims:
        raise ValueError(f"{name}: expected an integer or {dims} of them, got {value!r}")
    return values


def _resolve_padding(
    input: Tensor,
    weight: Tensor,
    padding: str,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[Tensor, tuple[int, ...]]:
    """Numbers for "valid" and "same"; an odd total border puts the extra pixel last, as stock."""
    if padding == "valid":
        return input, (0,) * len(stride)
    if padding != "same":
        raise ValueError(
            f"padding: {padding!r} is not 'same', 'valid', an integer or one for each dimension"
        )
    if any(step != 1 for step in stride):
        raise ValueError(f"padding='same' needs stride 1, but stride is {stride}")
    total = [dilation[i] * (weight.size(i + 2) - 1) for i in range(len(stride))]
    extra = [t % 2 for t in total]
    if any(extra):
        input = F.pad(input, [n for last in reversed(extra) for n in (0, last)])
    return input, tuple(t // 2 for t in total)


@torch.library.register_fake("wus::convolution")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    return torch.ops.aten.convolution(
        input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )


@torch.library.register_fake("wus::linear")
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.aten.linear(input, weight, bias)
