"""NaN, infinity and the ends of float32's range: what stock PyTorch computes, and nowhere else.

Transforms mix the pixels of a tile and are larger than its outputs; what they cannot hold is
computed without them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import wus_ext  # noqa: F401  (registers torch.ops.wus)

wus = torch.ops.wus

NAN, INF = float("nan"), float("inf")
#: (inputs, outputs, height, width, schemes); the last by frequencies, not by tiles.
LAYERS = [(16, 32, 9, 11, (2, 4)), (24, 20, 8, 8, (2, 4)), (16, 16, 2, 2, (0, 2)),
          (352, 272, 4, 4, (4,))]  # fmt: skip

layers = pytest.mark.parametrize("layer", LAYERS, ids=str)
spots = pytest.mark.parametrize("spot", [NAN, INF, -INF, 1e37, -2e38])
scales = pytest.mark.parametrize("scale", [1e30, 3e36, 3e37])


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def make(layer: tuple, spot: float = 1.0, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Input, weight, bias and gradient; the first and the last with a spot, or scaled."""
    torch.manual_seed(0)
    inputs, outputs, height, width, _ = layer
    x, g = torch.randn(2, inputs, height, width), torch.randn(2, outputs, height, width)
    x, g = x * scale, g * scale
    x[1, 3, height // 2, width // 2] = g[0, 2, 0, 0] = spot
    weight = torch.randn(outputs, inputs, 3, 3) / (6 * inputs**0.5)
    return channels_last(x), channels_last(weight), torch.randn(outputs), channels_last(g)


def backward(g, x, weight, stride=1):
    """Stock's gradients of input, weight and bias."""
    return torch.ops.aten.convolution_backward(
        g, x, weight, [g.size(1)], [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [True] * 3
    )


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN and infinities in the same places, and all else up to rounding."""
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    torch.testing.assert_close(actual[~finite], expected[~finite], equal_nan=True)
    assert actual[finite].isfinite().all()
    if finite.any():
        scale = expected[finite].abs().max().clamp(min=1e-30)
        error = (actual[finite] - expected[finite]).norm() / scale
        assert error <= 2e-5 * (expected[finite] / scale).norm(), error


def check(layer, x, weight, bias, g) -> None:
    inputs, outputs, height, width, schemes = layer
    z = F.conv2d(x, weight, bias, padding=1)
    grad_input, grad_weight, grad_bias = backward(g, x, weight)
    for scheme in schemes:
        packed, turned = (wus.winograd_pack(weight, dgrad, scheme) for dgrad in (False, True))

        def forward(epilogue, packed=packed, scheme=scheme):
            return wus.winograd_forward(x, packed, bias, outputs, 1, scheme, epilogue)

        y, nothing = forward(0)
        same(y, z)
        assert nothing.numel() == 0
        y, mask = forward(1)
        same(y, z.relu())
        bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(3)
        assert torch.equal(bits[..., :outputs].permute(0, 3, 1, 2) == 0, z <= 0)
        y, codes = forward(2)
        same(y, F.max_pool2d(z.relu(), 2))
        assert codes.shape == (2, height // 2, width // 2, outputs)
        y, stats = forward(3)
        same(y, z)
        exact = z.double()
        same(stats[0], exact.mean((0, 2, 3)))
        same(stats[1], exact.var((0, 2, 3), unbiased=False).float())

        size = (height, width)
        same(wus.winograd_dgrad(g, turned, None, inputs, size, 1, scheme, 0)[0], grad_input)
        actual, sums = wus.winograd_dgrad(g, turned, None, inputs, size, 1, scheme, 1)
        same(actual, grad_input)
        same(sums, grad_bias)
        for last in (True, False):
            actual = wus.winograd_wgrad(g, x, None, 1, scheme, 0, channels_last=last)
            same(actual, grad_weight)
            layout = torch.channels_last if last else torch.contiguous_format
            assert actual.is_contiguous(memory_format=layout)


@layers
@spots
def test_one_pixel(layer, spot):
    x, weight, bias, g = make(layer, spot)
    calm = make(layer)[3] if abs(spot) < INF else g  # the product of two large ones is too large
    check(layer, x, weight, bias, calm)
    check(layer, make(layer)[0], weight, bias, g)


@layers
@scales
def test_large_maps(layer, scale):
    x, weight, bias, _ = make(layer, spot=scale, scale=scale)
    check(layer, x, weight, bias, make(layer, spot=1e-18, scale=1e-18)[3])


@layers
@pytest.mark.parametrize("spot", [NAN, INF, 1e37])
def test_gradients_behind_masks(layer, spot):
    """What a mask stops is zero, NaN or not; a gradient of batch norm is made as it is read."""
    inputs, outputs, height, width, schemes = layer
    x, weight, _, g = make(layer, spot)
    x = make(layer)[0]
    keep = torch.rand(g.shape) < 0.5
    keep[0, 2, 0, 0] = True
    z, vectors = channels_last(torch.randn(g.shape)), torch.randn(3, outputs)
    masked = channels_last(torch.where(keep, g, 0))
    a, b, c = vectors[:, :, None, None]
    normalized = channels_last(a * masked + b * z + c)
    bits = F.pad(keep.permute(0, 2, 3, 1), (0, -outputs % 8)).unflatten(3, (-1, 8))
    mask = (bits * 2 ** torch.arange(8)).sum(-1).to(torch.uint8)
    for scheme in schemes:
        turned = wus.winograd_pack(weight, True, scheme)
        for prologue, given, rest in ((2, masked, ()), (5, normalized, (z, vectors))):
            grad_input, grad_weight, grad_bias = backward(given, x, weight)
            actual, sums = wus.winograd_dgrad(
                g, turned, mask, inputs, (height, width), 1, scheme, prologue, *rest
            )
            same(actual, grad_input)
            if prologue == 2:
                same(sums, grad_bias)
            same(wus.winograd_wgrad(g, x, mask, 1, scheme, prologue, *rest), grad_weight)


@pytest.mark.parametrize("size", [(9, 11), (8, 8), (6, 5)], ids=str)
@pytest.mark.parametrize("channels", [(16, 32), (19, 40)], ids=str)
@spots
def test_strided(size, channels, spot):
    x, weight, bias, _ = make((*channels, *size, ()), spot)
    z = F.conv2d(x, weight, bias, 2, 1)
    window = (3, 3), (2, 2), (1, 1)
    same(wus.strided_forward(x, wus.strided_pack(weight, False), bias, channels[1], *window), z)
    g = torch.randn_like(z)
    g[0, 2, 0, 0] = g[1, 1, 2, 1] = spot
    expected = backward(g, torch.ones_like(x), weight, 2)[0]
    rotated = wus.strided_pack(weight, True)
    same(wus.strided_dgrad(g, rotated, channels[0], size, *window), expected)


@pytest.mark.parametrize("channels", [16, 64, 256])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("scheme", [2, 4])
def test_a_bright_pixel(scheme, stride, channels):
    """What its rounding errors cost the outputs of its tile that do not see it: see numerics.md."""
    torch.manual_seed(0)
    weight, bright = torch.randn(48, channels, 3, 3), 1e6
    largest = weight[:, 3].abs().amax((1, 2))[:, None, None]
    worst = 0.0
    for row, col in [(4, 4), (5, 6), (7, 9), (8, 5)]:
        x = torch.randn(1, channels, 16, 16)
        x[0, 3, row, col] = bright
        x = channels_last(x)
        if stride == 2:
            window = (3, 3), (2, 2), (1, 1)
            z = wus.strided_forward(x, wus.strided_pack(weight, False), None, 48, *window)
        else:
            packed = wus.winograd_pack(weight, False, scheme)
            z, _ = wus.winograd_forward(x, packed, None, 48, 1, scheme, 0)
        expected = F.conv2d(x.double(), weight.double(), None, stride, 1)
        is_bright = (x[:, 3:4] == bright).double()
        sees = F.conv2d(is_bright, torch.ones(1, 1, 3, 3).double(), None, stride, 1) > 0
        error = (z - expected).abs().masked_fill(sees, 0) / largest
        worst = max(worst, error.max().item())
    reached = bright if scheme == 4 or stride == 2 else 10  # of F(2x2) only their own rounding
    assert worst <= 2**-19 * channels**0.5 * reached


@pytest.mark.parametrize("scheme", [0, 2, 4])
def test_transformed_weights_turn_back(scheme):
    """The convolution without a transform is of the same weight, up to the last bits."""
    torch.manual_seed(0)
    weight = torch.randn(40, 24, 3, 3)
    size = (2, 2) if scheme == 0 else (5, 6)
    x = channels_last(torch.randn(1, 24, *size))
    x[0, 0, 0, 0] = INF
    z = wus.winograd_forward(x, wus.winograd_pack(weight, False, scheme), None, 40, 1, scheme, 0)[0]
    same(z, F.conv2d(x, channels_last(weight), padding=1))
