"""The 1x1 convolution operators against torch in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import wus_ext  # noqa: F401  (registers torch.ops.wus)
from wus_ext.engine.activation import Kind
from wus_ext.engine.conv.copies import Form, packed_nbytes

from .rows import at_one_and_two_threads, dense, pack
from .rows import close as close_to
from .test_activation import KEPT, SLOPE, STOCK

ops = torch.ops.wus
close = partial(close_to, tolerance=2e-6)

#: name: (batch, inputs, outputs, height, width)
CASES = {
    "typical": (3, 32, 64, 8, 8),
    "tails": (2, 13, 21, 7, 9),
    "one_vector": (2, 24, 16, 6, 6),
    "part_of_a_vector": (2, 40, 24, 5, 5),
    "cache_sets": (2, 256, 512, 7, 7),
    "deep": (1, 1030, 40, 4, 4),
    "wide": (1, 16, 1030, 4, 4),
    "many_rows": (4, 8, 72, 40, 33),
    "one_pixel": (1, 17, 33, 1, 1),
    "one_channel": (2, 1, 1, 5, 6),
    "rounds": (2, 320, 300, 40, 40),
    "empty_batch": (0, 8, 8, 6, 6),
    **{f"size_{n}": (1 + n % 3, 9 * n, 70 - 5 * n, n, 12 - n) for n in range(1, 12)},
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
few = pytest.mark.parametrize("name", ["typical", "tails", "one_vector", "cache_sets", "many_rows"])
ACTS = [Kind.NONE, Kind.RELU6, Kind.LEAKY_RELU, Kind.SILU, Kind.GELU]
acts = pytest.mark.parametrize("act", ACTS, ids=lambda act: act.name.lower())


def make(case):
    batch, inputs, outputs, height, width = case
    torch.manual_seed(height * 100 + inputs)
    x = dense(torch.randn(batch, inputs, height, width))
    weight = torch.randn(outputs, inputs, 1, 1) / inputs**0.5
    return x, weight, torch.randn(outputs)


def forward(x, weight, bias, *rest):
    packed = ops.pointwise_pack(weight, False)
    return ops.pointwise_forward(x, packed, bias, weight.size(0), *rest)


def stats(x, weight, bias):
    packed = ops.pointwise_pack(weight, False)
    return ops.pointwise_forward_stats(x, packed, bias, weight.size(0))


def backward(g, weight, x, *rest, need_grad_input=True, **options):
    packed = ops.pointwise_pack(weight, True) if need_grad_input else None
    return ops.pointwise_backward(g, packed, x, weight.size(1), *rest, **options)


@cases
@pytest.mark.parametrize("biased", [False, True], ids=["no_bias", "bias"])
def test_forward(case, biased):
    x, weight, bias = make(case)
    bias = bias if biased else None
    y, saved = forward(x, weight, bias)
    close(y, F.conv2d(x.double(), weight.double(), bias.double() if biased else None))
    assert saved.numel() == 0


@cases
def test_statistics(case):
    x, weight, bias = make(case)
    y, mean, var = stats(x, weight, bias)
    expected = F.conv2d(x.double(), weight.double(), bias.double())
    close(y, expected)
    if case[0]:
        close(mean, expected.mean((0, 2, 3)))
        close(var, expected.var((0, 2, 3), unbiased=False))
    else:
        assert mean.isnan().all()


@cases
def test_gradients(case):
    x, weight, _ = make(case)
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = F.conv2d(*leaves)
    g = dense(torch.randn(expected.shape))
    expected.backward(g.double())
    grad_input, grad_weight, grad_bias = backward(g, weight, x, need_grad_bias=True)
    close(grad_input, leaves[0].grad)
    error = (grad_weight.double() - leaves[1].grad).norm()
    assert error <= 2e-6 * leaves[1].grad.norm()
    close(grad_bias, g.double().sum((0, 2, 3)))
    alone, *nothing = backward(g, weight, None)
    assert torch.equal(alone, grad_input)
    assert all(t.numel() == 0 for t in nothing)
    nothing, alone, _ = backward(g, weight, x, need_grad_input=False)
    assert nothing.numel() == 0
    assert torch.equal(alone, grad_weight)
    flat = backward(g, weight, x, need_grad_input=False, channels_last=False)[1]
    assert flat.is_contiguous()
    assert torch.equal(flat, grad_weight)


@acts
@few
def test_bias_and_activation(name, act):
    x, weight, bias = make(CASES[name])
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    z = F.conv2d(*leaves)
    expected = z if act == Kind.NONE else STOCK[act](z)
    y, saved = forward(x, weight, bias, act, SLOPE)
    close(y, expected)
    g = dense(torch.randn(expected.shape))
    mask = kept = None
    if act.bits:
        plain, _ = forward(x, weight, bias)
        assert torch.equal(saved, pack(KEPT[act](plain)))
        mask = saved
        # Within rounding of an edge forward may have taken the other side.
        g = torch.where(KEPT[act](plain) == KEPT[act](z.detach()), g, 0)
    elif act != Kind.NONE:
        close(saved, z)
        kept = saved
    expected.backward(g.double())
    grads = backward(dense(g), weight, x, mask, kept, None, act, SLOPE, need_grad_bias=True)
    for actual, leaf in zip(grads, leaves, strict=True):
        scale = max(1.0, float(leaf.grad.abs().max()))
        torch.testing.assert_close(actual.double(), leaf.grad, rtol=0, atol=5e-6 * scale)


@acts
@pytest.mark.parametrize("bits", [False, True], ids=["recomputed", "bits"])
@few
def test_gradient_behind_a_norm(name, act, bits):
    if bits and not act.bits:
        pytest.skip("no bits for this activation")
    x, weight, bias = make(CASES[name])
    outputs = weight.size(0)
    z = dense(torch.randn(forward(x, weight, bias)[0].shape) * 4)
    g = dense(torch.randn(z.shape))
    abc, scale, shift = torch.randn(3, outputs), torch.rand(outputs), torch.randn(outputs)
    _, mask = ops.batch_norm_apply(z, scale, shift, None, act, SLOPE)
    mask = mask if bits else None
    grad_z, _ = ops.batch_norm_grad_input(g, z, *abc, mask, scale, shift, act, SLOPE)
    rows = abc if bits or act == Kind.NONE else torch.cat([abc, scale[None], shift[None]])
    actual = backward(g, weight, x, mask, z, rows, act, SLOPE)
    for one, other in zip(actual, backward(grad_z, weight, x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["typical", "tails", "many_rows", "rounds"])
def test_threads_agree(name):
    x, weight, bias = make(CASES[name])

    def run():
        y, mean, var = stats(x, weight, bias)
        return [y, mean, var, *backward(y, weight, x, need_grad_bias=True)]

    at_one_and_two_threads(run)


def test_other_layouts():
    x, weight, bias = make(CASES["tails"])
    turned = weight.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.stack([x.contiguous()] * 2, -1)[..., 0]
    y, _ = forward(x, weight, bias)
    assert torch.equal(forward(wide, turned, bias)[0], y)
    for one, other in zip(
        backward(y.contiguous(), turned, wide), backward(y, weight, x), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dgrad", [False, True])
def test_packing(dgrad):
    weight = torch.randn(70, 45, 1, 1)
    packed = ops.pointwise_pack(weight, dgrad)
    again = ops.pointwise_pack_(torch.full_like(packed, 7), weight, dgrad)
    assert torch.equal(again, packed)
    copies = [ops.pointwise_pack(weight, dgrad) for dgrad in (False, True)]
    assert packed_nbytes(weight, Form("pointwise")) == sum(copy.nbytes for copy in copies)


X = dense(torch.randn(2, 8, 6, 6))
WEIGHT = torch.randn(16, 8, 1, 1)
PACKED = ops.pointwise_pack(WEIGHT, False)
TRANSPOSED = ops.pointwise_pack(WEIGHT, True)
GRAD = dense(torch.randn(2, 16, 6, 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.pointwise_pack(torch.randn(8, 8, 3, 3), False), "weight must be"),
        (lambda: ops.pointwise_pack(WEIGHT.double(), False), "weight must be a float32"),
        (lambda: ops.pointwise_pack_(PACKED[:-1], WEIGHT, False), "packed must be contiguous"),
        (lambda: ops.pointwise_forward(X[0], PACKED, None, 16), "input must be"),
        (lambda: ops.pointwise_forward(X.double(), PACKED, None, 16), "input must be a float32"),
        (lambda: ops.pointwise_forward(X, PACKED, None, 160), "packed must be"),
        (lambda: ops.pointwise_forward(X, PACKED, torch.zeros(3), 16), "bias must be"),
        (lambda: ops.pointwise_forward(X, PACKED, None, 16, 99), "act must be"),
        (lambda: ops.pointwise_backward(GRAD, TRANSPOSED, X[:1], 8), "input must have shape"),
        (lambda: ops.pointwise_backward(GRAD, TRANSPOSED, None, 80), "packed must be"),
        (
            lambda: ops.pointwise_backward(GRAD, TRANSPOSED, None, 8, None, GRAD, X[0, 0], 0),
            "batch_norm must be",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
