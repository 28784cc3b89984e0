"""conv2d and linear with a skip flag, and what torch.compile must know of the operators.

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

Size2 = int | Sequence[int]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
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
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    if isinstance(padding, str):
        input, padding = _resolve_padding(input, weight, padding, stride, dilation)
    padding = _pair("padding", padding)
    return torch.ops.wus.conv2d(
        input, weight, bias, stride, padding, dilation, groups, skip_wgrad=True
    )


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
    return torch.ops.wus.linear(input, weight, bias, skip_wgrad=True)


def pad(input: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """:func:`torch.nn.functional.pad` of the last two dimensions that saves nothing for backward.

    Stock's reflect and replicate padding save their input; here the border is copied together from
    slices, whose backward needs sizes only.

    Args:
        input: ``(..., H, W)``.
        padding: ``(left, right, top, bottom)`` in pixels, none negative.
        mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Returns:
        ``(..., H + top + bottom, W + left + right)``.

    Raises:
        ValueError: for another mode, or a border wider than the mode can fill.
    """
    left, right, top, bottom = padding
    if mode == "zeros":
        return F.pad(input, (left, right, top, bottom))
    channels_last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    padded = _pad_dim(_pad_dim(input, -2, top, bottom, mode), -1, left, right, mode)
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


def _pair(name: str, value: Size2) -> tuple[int, int]:
    if isinstance(value, int | torch.SymInt):
        return (value, value)
    values = tuple(value)
    if len(values) == 1:
        values *= 2
    if len(values) != 2:
        raise ValueError(f"{name}: expected one or two integers, got {value!r}")
    return values


def _resolve_padding(
    input: Tensor,
    weight: Tensor,
    padding: str,
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:
    """Numbers for "valid" and "same"; an odd total border puts the extra pixel last, as stock."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise ValueError(f"padding: {padding!r} is not 'same', 'valid' or one or two integers")
    if stride != (1, 1):
        raise ValueError(f"padding='same' needs stride 1, but stride is {stride}")
    total = [dilation[i] * (weight.size(i + 2) - 1) for i in range(2)]
    extra = [t % 2 for t in total]
    if any(extra):
        input = F.pad(input, (0, extra[1], 0, extra[0]))
    return input, (total[0] // 2, total[1] // 2)


@torch.library.register_fake("wus::conv2d")
def _(input, weight, bias, stride, padding, dilation, groups, skip_wgrad):
    return torch.ops.aten.conv2d(input, weight, bias, stride, padding, dilation, groups)


@torch.library.register_fake("wus::linear")
def _(input, weight, bias, skip_wgrad):
    return torch.ops.aten.linear(input, weight, bias)
