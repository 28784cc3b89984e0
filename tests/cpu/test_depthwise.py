"""The depthwise convolution operators against torch in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import wus_ext  # noqa: F401  (registers torch.ops.wus)
from wus_ext.engine.activation import Kind

from .rows import at_one_and_two_threads, close, dense, pack
from .test_activation import KEPT, SLOPE, STOCK

ops = torch.ops.wus


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    channels: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        return self.name

    @property
    def window(self) -> tuple[list[int], list[int]]:
        return [self.stride] * 2, list(self.padding)

    def convolve(self, x, weight, bias=None):
        return F.conv2d(x, weight, bias, self.stride, self.padding, groups=self.channels)


CASES = [
    Case("typical", 3, 32, 14, 14),
    Case("stride", 3, 32, 14, 14, stride=2),
    Case("five", 2, 48, 12, 11, 5, padding=(2, 2)),
    Case("five_stride", 2, 48, 12, 11, 5, 2, (2, 2)),
    Case("tail", 2, 21, 9, 7),
    Case("tail_stride", 2, 21, 9, 7, stride=2),
    Case("one_channel", 2, 1, 6, 5, 5, 1, (2, 2)),
    Case("cache_sets", 1, 1024, 7, 7),
    Case("cache_sets_stride", 1, 256, 8, 8, 5, 2, (2, 2)),
    Case("one_pixel", 2, 16, 1, 1),
    Case("one_row_five", 2, 16, 1, 9, 5, 2, (2, 2)),
    Case("no_padding", 2, 13, 8, 6, padding=(0, 0)),
    Case("no_padding_five", 2, 13, 8, 6, 5, 2, (0, 0)),
    Case("wide_padding", 2, 13, 5, 4, padding=(2, 2)),
    Case("wide_padding_stride", 2, 13, 5, 4, stride=2, padding=(2, 1)),
    Case("widest_padding_five", 2, 24, 5, 6, 5, 2, (4, 3)),
    Case("uneven_padding", 2, 24, 6, 7, 5, 1, (0, 3)),
    Case("blocks", 2, 8, 70, 5),
    Case("blocks_stride", 2, 8, 71, 6, 5, 2, (2, 2)),
    Case("many_images", 70, 9, 4, 4),
    Case("empty_batch", 0, 8, 6, 6),
    *[
        Case(f"size_{n}_k{k}_s{s}", 2, 17, n, 12 - n, k, s, (k // 2, k // 2))
        for n in range(1, 12)
        for k in (3, 5)
        for s in (1, 2)
    ],
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
ACTS = [Kind.NONE, Kind.RELU6, Kind.LEAKY_RELU, Kind.SILU, Kind.GELU]
acts = pytest.mark.parametrize("act", ACTS, ids=lambda act: act.name.lower())


def make(case):
    torch.manual_seed(case.height * 100 + case.channels)
    x = dense(torch.randn(case.batch, case.channels, case.height, case.width))
    weight = torch.randn(case.channels, 1, case.kernel, case.kernel) / case.kernel
    return x, weight, torch.randn(case.channels)


def apply(kind, x):
    return x if kind == Kind.NONE else STOCK[kind](x)


@cases
@pytest.mark.parametrize("biased", [False, True], ids=["no_bias", "bias"])
def test_forward(case, biased):
    x, weight, bias = make(case)
    bias = bias if biased else None
    expected = case.convolve(x.double(), weight.double(), bias if bias is None else bias.double())
    y, saved = ops.depthwise_forward(x, weight, bias, *case.window)
    close(y, expected)
    assert saved.numel() == 0


@cases
def test_statistics(case):
    x, weight, bias = make(case)
    y, mean, var = ops.depthwise_forward_stats(x, weight, bias, *case.window)
    expected = case.convolve(x.double(), weight.double(), bias.double())
    close(y, expected)
    if case.batch:
        close(mean, expected.mean((0, 2, 3)))
        close(var, expected.var((0, 2, 3), unbiased=False))
    else:
        assert mean.isnan().all()


@cases
def test_gradients(case):
    x, weight, _ = make(case)
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = case.convolve(*leaves)
    g = dense(torch.randn(expected.shape))
    expected.backward(g.double())
    size = list(x.shape[2:])
    grad_input, grad_weight, grad_bias = ops.depthwise_backward(
        g, weight, x, size, *case.window, need_grad_bias=True
    )
    close(grad_input, leaves[0].grad)
    assert grad_weight.stride() == weight.stride()
    torch.testing.assert_close(
        grad_weight.double(), leaves[1].grad, rtol=1e-5, atol=1e-6 * (1 + g.numel() ** 0.5)
    )
    close(grad_bias, g.double().sum((0, 2, 3)))
    alone, *nothing = ops.depthwise_backward(g, weight, None, size, *case.window)
    assert torch.equal(alone, grad_input)
    assert all(t.numel() == 0 for t in nothing)
    nothing, alone, _ = ops.depthwise_backward(
        g, weight, x, size, *case.window, need_grad_input=False
    )
    assert nothing.numel() == 0
    assert torch.equal(alone, grad_weight)


@acts
@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_bias_and_activation(case, act):
    x, weight, bias = make(case)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    z = case.convolve(*leaves)
    expected = apply(act, z)
    y, saved = ops.depthwise_forward(x, weight, bias, *case.window, act, SLOPE)
    close(y, expected)
    g = dense(torch.randn(expected.shape))
    mask = kept = None
    if act.bits:
        plain, _ = ops.depthwise_forward(x, weight, bias, *case.window)
        assert torch.equal(saved, pack(KEPT[act](plain)))
        mask = saved
        # Within rounding of an edge forward may have taken the other side.
        g = torch.where(KEPT[act](plain) == KEPT[act](z.detach()), g, 0)
    elif act != Kind.NONE:
        close(saved, z)
        kept = saved
    expected.backward(g.double())
    grads = ops.depthwise_backward(
        dense(g), weight, x, list(x.shape[2:]), *case.window, mask, kept, None, act, SLOPE,
        need_grad_bias=True,
    )  # fmt: skip
    for actual, leaf in zip(grads, leaves, strict=True):
        scale = max(1.0, float(leaf.grad.abs().max()))
        torch.testing.assert_close(actual.double(), leaf.grad, rtol=0, atol=3e-6 * scale)


@acts
@pytest.mark.parametrize("bits", [False, True], ids=["recomputed", "bits"])
@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_gradient_behind_a_norm(case, act, bits):
    if bits and not act.bits:
        pytest.skip("no bits for this activation")
    x, weight, _ = make(case)
    size = list(x.shape[2:])
    z = dense(torch.randn(ops.depthwise_forward(x, weight, None, *case.window)[0].shape) * 4)
    g = dense(torch.randn(z.shape))
    abc, scale, shift = (
        torch.randn(3, case.channels),
        torch.rand(case.channels),
        torch.randn(case.channels),
    )
    _, mask = ops.batch_norm_apply(z, scale, shift, None, act, SLOPE)
    mask = mask if bits else None
    grad_z, _ = ops.batch_norm_grad_input(g, z, *abc, mask, scale, shift, act, SLOPE)
    expected = ops.depthwise_backward(grad_z, weight, x, size, *case.window)
    rows = abc if bits or act == Kind.NONE else torch.cat([abc, scale[None], shift[None]])
    actual = ops.depthwise_backward(g, weight, x, size, *case.window, mask, z, rows, act, SLOPE)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["typical", "five_stride", "blocks_stride", "many_images"])
def test_threads_agree(name):
    case = next(case for case in CASES if case.name == name)
    x, weight, bias = make(case)

    def run():
        y, mean, var = ops.depthwise_forward_stats(x, weight, bias, *case.window)
        size = list(x.shape[2:])
        return [
            y,
            mean,
            var,
            *ops.depthwise_backward(y, weight, x, size, *case.window, need_grad_bias=True),
        ]

    at_one_and_two_threads(run)


def test_other_layouts():
    case = CASES[0]
    x, weight, bias = make(case)
    turned = weight.transpose(2, 3).contiguous().transpose(2, 3)
    y, _ = ops.depthwise_forward(x, weight, bias, *case.window)
    wide = torch.stack([x.contiguous()] * 2, -1)[..., 0]
    assert torch.equal(ops.depthwise_forward(wide, turned, bias, *case.window)[0], y)
    size = list(x.shape[2:])
    for one, other in zip(
        ops.depthwise_backward(y.contiguous(), turned, wide, size, *case.window),
        ops.depthwise_backward(y, weight, x, size, *case.window),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_infinite_weight_meets_no_padding_above_and_below():
    x, weight = dense(torch.ones(1, 8, 3, 3)), torch.zeros(8, 1, 3, 3)
    weight[:, :, 0, 1] = float("inf")
    y, _ = ops.depthwise_forward(x, weight, None, [1, 1], [1, 1])
    assert not y[:, :, 0].isnan().any()


X = dense(torch.randn(2, 8, 6, 6))
WEIGHT = torch.randn(8, 1, 3, 3)
WINDOW = [1, 1], [1, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.depthwise_forward(X, torch.randn(8, 1, 7, 7), None, *WINDOW), "weight must"),
        (lambda: ops.depthwise_forward(X, torch.randn(8, 2, 3, 3), None, *WINDOW), "weight must"),
        (
            lambda: ops.depthwise_forward(X, WEIGHT.double(), None, *WINDOW),
            "weight must be a float32",
        ),
        (lambda: ops.depthwise_forward(X[0], WEIGHT, None, *WINDOW), "input must be"),
        (lambda: ops.depthwise_forward(X[:, :4], WEIGHT, None, *WINDOW), "input must have shape"),
        (lambda: ops.depthwise_forward(X, WEIGHT, torch.zeros(4), *WINDOW), "bias must be"),
        (lambda: ops.depthwise_forward(X, WEIGHT, None, [3, 3], [1, 1]), "stride must be"),
        (lambda: ops.depthwise_forward(X, WEIGHT, None, [1, 2], [1, 1]), "stride must be"),
        (lambda: ops.depthwise_forward(X, WEIGHT, None, [1, 1], [3, 1]), "padding must be"),
        (lambda: ops.depthwise_forward(X[:, :, :1], WEIGHT, None, [1, 1], [0, 0]), "smaller than"),
        (lambda: ops.depthwise_forward(X, WEIGHT, None, *WINDOW, 99), "act must be"),
        (lambda: ops.depthwise_backward(X, WEIGHT, None, [5, 6], *WINDOW), "grad_output must have"),
        (
            lambda: ops.depthwise_backward(X, WEIGHT, X[:1], [6, 6], *WINDOW),
            "input must have shape",
        ),
        (
            lambda: ops.depthwise_backward(
                X, WEIGHT, None, [6, 6], *WINDOW, None, X, torch.randn(3, 8), 6
            ),
            "batch_norm needs scale and shift",
        ),
        (
            lambda: ops.depthwise_backward(
                X, WEIGHT, None, [6, 6], *WINDOW, None, None, torch.randn(3, 8)
            ),
            "z must be given",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
