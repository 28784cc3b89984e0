"""The activations against stock, in float64 where they round."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import wus_ext  # noqa: F401  (registers torch.ops.wus)
from wus_ext.engine.activation import Act, Kind, Pool, activate, masked

from .rows import SHAPES, at_one_and_two_threads, check_sums, dense, pack, rows_of, same, values

ops = torch.ops.wus

SLOPE = 0.2
STOCK = {
    Kind.RELU: F.relu,
    Kind.RELU6: F.relu6,
    Kind.LEAKY_RELU: lambda x: F.leaky_relu(x, SLOPE),
    Kind.HARDSIGMOID: F.hardsigmoid,
    Kind.HARDSWISH: F.hardswish,
    Kind.SILU: F.silu,
    Kind.SIGMOID: torch.sigmoid,
    Kind.GELU: F.gelu,
    Kind.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}
BITS = [kind for kind in STOCK if kind.bits]
SMOOTH = [kind for kind in STOCK if not kind.bits]
kinds = pytest.mark.parametrize("kind", STOCK, ids=lambda kind: kind.name.lower())
#: Where the slope has two values: whether it is the first.
KEPT = {
    Kind.RELU: lambda x: ~(x <= 0),
    Kind.RELU6: lambda x: ~((x <= 0) | (x >= 6)),
    Kind.LEAKY_RELU: lambda x: x > 0,
    Kind.HARDSIGMOID: lambda x: (x > -3) & (x < 3),
}


def stock(kind, x, g):
    """Output and gradient, of x's type."""
    x = x.clone().requires_grad_()
    y = STOCK[kind](x)
    y.backward(g)
    return y.detach(), x.grad


def near(actual, expected, size):
    """Within a few roundings of `size`."""
    error = (actual.double() - expected).abs()
    limit = 8 * 2.0**-24 * size.abs() + 1e-37
    assert (error <= limit).all(), f"{(error / limit).max():.2f} of what is allowed"


def size(y, x):
    """What an activation of x may round by: its exponent rounds, too, and float64 stock cancels."""
    return y.abs() * (1 + x.abs()) + 1e-3 * x.abs().clamp(max=1)


def gradient(kind, g, x, mask, **options):
    if kind.bits:
        return ops.activate_grad(g, mask, None, kind, SLOPE, **options)
    return ops.activate_grad(g, None, x, kind, SLOPE, **options)


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(shape, kind):
    x, g = dense(torch.randn(shape) * 4), dense(torch.randn(shape))
    before = x.clone()
    y, mask = ops.activate(x, None, kind, SLOPE)
    same(x, before)
    expected, expected_grad = stock(kind, x.double(), g.double())
    near(y, expected, size(expected, x))
    assert dense(y).data_ptr() == y.data_ptr()
    if kind.bits:
        same(mask, pack(KEPT[kind](x)))
    else:
        assert mask.numel() == 0
    grad_input, grad_bias = gradient(kind, g, x, mask)
    near(grad_input, expected_grad, g)
    check_sums(grad_bias, grad_input)
    nothing, again = gradient(kind, g, x, mask, need_grad_input=False)
    assert nothing.numel() == 0
    same(again, grad_bias)
    alone, nothing = gradient(kind, g, x, mask, need_grad_bias=False)
    assert nothing.numel() == 0
    same(alone, grad_input)


@pytest.mark.parametrize("kind", BITS, ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_slopes_are_stocks_exactly(shape, kind):
    x, g = values(shape, special=True), dense(torch.randn(shape))
    y, mask = ops.activate(x, None, kind, SLOPE)
    expected, expected_grad = stock(kind, x, g)
    same(y, expected)
    same(mask, pack(KEPT[kind](x)))
    grad_input, _ = gradient(kind, g, x, mask)
    known = ~x.isnan() | (kind != Kind.RELU6)  # whose lanes do not agree in stock
    if kind == Kind.HARDSIGMOID:  # g / 6 or g * (1 / 6)
        torch.testing.assert_close(grad_input, expected_grad, rtol=2e-7, atol=0)
    else:
        same(grad_input[known], expected_grad[known])


@pytest.mark.parametrize("kind", BITS, ids=lambda kind: kind.name.lower())
def test_edges_and_special_values_are_stocks(kind):
    edges = [0.0, -0.0, 3.0, -3.0, 6.0, 1e-45, -1e-45, float("nan"), float("inf"), float("-inf")]
    around = [
        torch.nextafter(torch.tensor(e), torch.tensor(t)).item() for e in edges for t in (-9.0, 9.0)
    ]
    x = torch.tensor(edges + around).repeat(3)[None]
    g = torch.arange(x.numel()).float()[None] - 20
    expected, expected_grad = stock(kind, x, g)
    y, mask = ops.activate(x, None, kind, SLOPE)
    torch.testing.assert_close(y, expected, rtol=2e-7, atol=0, equal_nan=True)
    grad_input, _ = gradient(kind, g, x, mask)
    # Of a NaN stock's ReLU6 passes the gradient in some lanes only.
    known = ~x.isnan() | (kind != Kind.RELU6)
    torch.testing.assert_close(grad_input[known], expected_grad[known], rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", SMOOTH, ids=lambda kind: kind.name.lower())
def test_smooth_over_the_whole_range(kind):
    magnitudes = torch.cat([torch.logspace(-30, 2.3, 5001), torch.linspace(0, 20, 5003)])
    x = torch.cat([magnitudes, -magnitudes])[None]
    g = torch.ones_like(x)
    expected, expected_grad = stock(kind, x.double(), g.double())
    y, mask = ops.activate(x, None, kind)
    near(y, expected, size(expected, x))
    near(gradient(kind, g, x, mask)[0], expected_grad, expected_grad.abs() + 0.5)


@pytest.mark.parametrize("kind", SMOOTH, ids=lambda kind: kind.name.lower())
def test_smooth_special_values(kind):
    x = torch.tensor([[float("nan"), float("inf"), 0.0, 1000.0, -1000.0]])
    y, _ = ops.activate(x, None, kind)
    one = 1.0 if kind == Kind.SIGMOID else float("inf")
    high = 1.0 if kind == Kind.SIGMOID else 1000.0
    low = 0.5 if kind == Kind.SIGMOID else 0.0
    same(y, torch.tensor([[float("nan"), one, low, high, 0.0]]))
    grad, _ = ops.activate_grad(torch.ones(1, 5), None, x, kind)
    assert grad[0, 0].isnan() or kind == Kind.HARDSWISH
    flat = float(kind != Kind.SIGMOID)
    same(grad[0, 3:], torch.tensor([flat, 0.0]))


@kinds
def test_in_place(kind):
    x = values((2, 13, 3, 5), special=kind.bits)
    expected, expected_mask = ops.activate(x, None, kind, SLOPE)
    y, mask = ops.activate_(x, kind, SLOPE)
    assert y.data_ptr() == x.data_ptr()
    same(x, expected)
    same(mask, expected_mask)


@pytest.mark.parametrize("kind", [Kind.NONE, *BITS], ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_of_two(shape, kind):
    x, z = values(shape, special=True), values(shape)
    y, mask = ops.activate(x, z, kind, SLOPE)
    expected, expected_mask = ops.activate(x + z, None, kind, SLOPE)
    same(y, expected)
    same(mask, expected_mask)


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_a_blocked_gradient_is_zero_whatever_it_was(special):
    x = torch.tensor([[-1.0, 1.0, 0.0, 7.0]])
    for kind in (Kind.RELU, Kind.RELU6):
        _, mask = ops.activate(x, None, kind)
        grad_input, _ = ops.activate_grad(torch.full((1, 4), special), mask, None, kind)
        last = special if kind == Kind.RELU else 0
        same(grad_input, torch.tensor([[0, special, 0, last]]))


def test_no_activation_sums_the_gradient():
    g = dense(torch.randn(4, 13, 5, 5))
    grad_input, grad_bias = ops.activate_grad(g, act=0)
    assert grad_input.numel() == 0
    check_sums(grad_bias, g)


@kinds
def test_gradient_of_any_strides(kind):
    x, g = values((2, 13, 4, 4)), torch.randn(2, 13, 4, 4)
    _, mask = ops.activate(x, None, kind, SLOPE)
    views = [g, torch.stack([g, g], -1)[..., 0], g[:, :, :1, :1].expand(2, 13, 4, 4)]
    for view in views:
        results = gradient(kind, view, x.contiguous(), mask)
        for result, expected in zip(results, gradient(kind, dense(view), x, mask), strict=True):
            same(result, expected)


def test_sum_is_exact_over_many_rows_and_for_any_number_of_threads():
    g = torch.rand(50_000, 24) + 0.5
    (_, total) = at_one_and_two_threads(lambda: ops.activate_grad(g, act=0))
    torch.testing.assert_close(total.double(), g.double().sum(0), rtol=3e-7, atol=0)


@kinds
def test_threads_agree(kind):
    x, g = values((8, 100, 16, 16)), dense(torch.randn(8, 100, 16, 16))
    _, mask = at_one_and_two_threads(lambda: ops.activate(x, None, kind, SLOPE))
    at_one_and_two_threads(lambda: gradient(kind, g, x, mask))


ACTS = [Act(kind, SLOPE) for kind in Kind] + [
    Act(kind, pool=pool)
    for kind in (Kind.NONE, Kind.RELU)
    for pool in (Pool(2, 2), Pool(3, 2, 1), Pool(3, 2, 0, True))
]


@pytest.mark.parametrize("act", ACTS, ids=lambda act: f"{act.kind.name.lower()}{act.pool or ''}")
def test_what_engines_call(act):
    x = dense(torch.randn(3, 13, 7, 6))
    leaf = x.double().requires_grad_()
    expected = leaf if act.kind == Kind.NONE else STOCK[act.kind](leaf)
    if act.pool is not None:
        k, s, p, ceil = act.pool
        expected = F.max_pool2d(expected, k, s, p, ceil_mode=ceil)
    y, saved = activate(x.clone(memory_format=torch.channels_last), act)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    g = dense(torch.randn(expected.shape))
    expected.backward(g.double())
    grad, grad_bias = masked(g, saved, act, (7, 6), True, True)
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_bias.double(), rows_of(leaf.grad).sum(0), rtol=1e-5, atol=1e-5)
    assert masked(g, saved, act, (7, 6), False, False) == (None, None)
    if saved is not None and not act.smooth:
        assert saved.nbytes <= (x.numel() if act.pool else 3 * 7 * 6 * 2)


def test_bad_arguments_are_named():
    x = values((2, 8, 3, 3))
    _, mask = ops.activate(x)
    with pytest.raises(ValueError, match=r"input must be a float32 .* got Double"):
        ops.activate(x.double())
    with pytest.raises(ValueError, match=r"act must be .* got 10"):
        ops.activate(x, act=10)
    with pytest.raises(ValueError, match=r"mask must be .* \[18, 1\].* got Byte of size \[17, 1\]"):
        ops.activate_grad(x, mask[:17])
    with pytest.raises(ValueError, match=r"mask must be given for act 1 to 4 only, .* act 6"):
        ops.activate_grad(x, mask, x, 6)
    with pytest.raises(ValueError, match=r"mask .* or input must be given for act 6"):
        ops.activate_grad(x, act=6)
    with pytest.raises(ValueError, match="grad_output has size"):
        ops.activate_grad(x[:1], None, x, 6)
    with pytest.raises(ValueError, match="input must be dense"):
        ops.activate_(torch.randn(2, 8, 3, 3))
    with pytest.raises(ValueError, match="other has size"):
        ops.activate(x, x[:1])
    with pytest.raises(ValueError, match=r"other needs an act .* got 6"):
        ops.activate(x, x, 6)
