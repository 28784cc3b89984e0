"""An output that sees nothing but zeros is exactly zero before its bias, as in stock PyTorch.

Transforms mix the pixels of a tile: where one of them is not zero, what cancels leaves rounding
errors, and half of those are positive and would pass a ReLU's gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import wus_ext  # noqa: F401  (registers torch.ops.wus)

wus = torch.ops.wus

SIZES = [(1, 6), (5, 9), (8, 8), (16, 18)]
#: Input and output channels: whole vectors, and what is left over.
CHANNELS = [(8, 16), (24, 40), (19, 33)]


def pixels(kind: str, images: int, height: int, width: int) -> torch.Tensor:
    """Which pixels are not zero: [images, 1, height, width]."""
    kept = torch.zeros(images, 1, height, width)
    for i in range(images):
        if kind == "one_hot":
            kept[i, 0, torch.randint(height, ()), torch.randint(width, ())] = 1
        elif kind == "border":
            kept[i, 0, height // 4 : -(-3 * height // 4), width // 4 : -(-3 * width // 4)] = 1
        elif kind == "half":
            kept[i, 0, :, : width // 2 + i] = 1
        elif kind == "sparse":
            kept[i] = torch.rand(height, width) < 0.08
        else:
            kept[i] = 1
    return kept


def sparse_map(kind: str, images: int, channels: int, height: int, width: int) -> torch.Tensor:
    values = torch.randn(images, channels, height, width)
    if kind == "one_channel":  # the others are zero; -0.0 counts as zero
        values[:, torch.arange(channels) != channels // 2] *= 0.0
    values = values * pixels(kind, images, height, width)
    return values.contiguous(memory_format=torch.channels_last)


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Zeros where the exact result is zero; elsewhere a sum may happen to round to zero."""
    assert (actual[expected == 0] == 0).all()
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


KINDS = pytest.mark.parametrize(
    "kind", ["one_hot", "border", "half", "sparse", "one_channel", "dense"]
)


@KINDS
@pytest.mark.parametrize(
    ("size", "padding"),
    [(size, padding) for size in SIZES for padding in (0, 1, 2) if min(size) + 2 * padding >= 3],
    ids=str,
)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("scheme", [2, 4])
def test_winograd(kind, size, channels, scheme, padding):
    torch.manual_seed(0)
    inputs, outputs = channels
    weight = torch.randn(outputs, inputs, 3, 3)
    x = sparse_map(kind, 3, inputs, *size)
    expected = F.conv2d(x.double(), weight.double(), padding=padding)
    packed = wus.winograd_pack(weight, False, scheme)
    check(wus.winograd_forward(x, packed, None, outputs, padding, scheme, 0)[0], expected)

    g = sparse_map(kind, 3, outputs, *expected.shape[2:])
    expected = F.conv_transpose2d(g.double(), weight.double(), padding=padding)
    packed = wus.winograd_pack(weight, True, scheme)
    check(wus.winograd_dgrad(g, packed, None, inputs, size, padding, scheme, 0)[0], expected)


@KINDS
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_strided(kind, size, channels):
    torch.manual_seed(0)
    inputs, outputs = channels
    weight = torch.randn(outputs, inputs, 3, 3)
    window = (3, 3), (2, 2), (1, 1)
    x = sparse_map(kind, 3, inputs, *size)
    double = x.double().requires_grad_()
    expected = F.conv2d(double, weight.double(), None, 2, 1)
    check(wus.strided_forward(x, wus.strided_pack(weight, False), None, outputs, *window), expected)

    g = sparse_map(kind, 3, outputs, *expected.shape[2:])
    (expected,) = torch.autograd.grad(expected, double, g.double())
    check(wus.strided_dgrad(g, wus.strided_pack(weight, True), inputs, size, *window), expected)


@pytest.mark.parametrize("kind", ["one_hot", "border", "sparse"])
@pytest.mark.parametrize("scheme", [2, 4])
def test_epilogues(kind, scheme):
    """Masks and pooling codes see the zeros; a bias is added to them."""

    def agree(kept, exact):
        certain = (exact == 0) | (exact.abs() > 1e-5)
        assert torch.equal(kept[certain], (exact > 0)[certain])

    torch.manual_seed(0)
    weight, bias = torch.randn(24, 16, 3, 3), torch.randn(24)
    bias[:12] = 0
    x = sparse_map(kind, 3, 16, 12, 10)
    z = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    packed = wus.winograd_pack(weight, False, scheme)
    y, mask = wus.winograd_forward(x, packed, bias, 24, 1, scheme, 1)
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(3)
    agree(bits.bool().permute(0, 3, 1, 2), z)
    pooled, codes = wus.winograd_forward(x, packed, bias, 24, 1, scheme, 2)
    agree(codes.permute(0, 3, 1, 2) != 4, F.max_pool2d(z, 2))
    agree(pooled > 0, F.max_pool2d(z, 2))
    empty = F.conv2d(x.abs().sum(1, keepdim=True), torch.ones(1, 1, 3, 3), padding=1) == 0
    assert empty.any()
    assert torch.equal(torch.where(empty, bias[:, None, None].relu(), y), y)
    z_out, stats = wus.winograd_forward(x, packed, None, 24, 1, scheme, 3)
    check(z_out, F.conv2d(x.double(), weight.double(), padding=1))
    var, mean = torch.var_mean(z_out.double(), (0, 2, 3), correction=0)
    assert ((stats[0] - mean).abs() <= 1e-5 * var.sqrt()).all()


@pytest.mark.parametrize("kind", ["one_hot", "border", "sparse"])
@pytest.mark.parametrize("scheme", [2, 4])
def test_masked_gradients(kind, scheme):
    """The gradient is zero where the mask or the pooling code stops it, not where it is stored."""
    torch.manual_seed(0)
    weight = torch.randn(24, 16, 3, 3)
    packed = wus.winograd_pack(weight, True, scheme)
    kept = pixels(kind, 3, 12, 10).bool().expand(3, 24, 12, 10)
    g = torch.randn(3, 24, 12, 10).contiguous(memory_format=torch.channels_last)
    bits = kept.permute(0, 2, 3, 1).unflatten(3, (3, 8)) * 2 ** torch.arange(8)
    mask = bits.sum(-1).to(torch.uint8)
    expected = F.conv_transpose2d((g * kept).double(), weight.double(), padding=1)
    check(wus.winograd_dgrad(g, packed, mask, 16, (12, 10), 1, scheme, 2)[0], expected)

    passes = pixels(kind, 3, 6, 5).bool().expand(3, 24, 6, 5)
    codes = torch.where(passes, torch.randint(4, passes.shape), 4)
    g = torch.randn(3, 24, 6, 5).contiguous(memory_format=torch.channels_last)
    full = torch.zeros(3, 24, 12, 10, dtype=torch.float64)
    for code in range(4):
        full[..., code // 2 :: 2, code % 2 :: 2] = torch.where(codes == code, g, 0)
    stored = codes.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
    expected = F.conv_transpose2d(full, weight.double(), padding=1)
    check(wus.winograd_dgrad(g, packed, stored, 16, (12, 10), 1, scheme, 3)[0], expected)
