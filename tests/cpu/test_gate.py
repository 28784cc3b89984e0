import pytest
import torch

import wus_ext  # noqa: F401

from .rows import CHANNELS, at_one_and_two_threads, dense, same

ops = torch.ops.wus

SHAPES = [
    *[(2, c, 3, 5) for c in CHANNELS],
    (1, 5, 1, 1),
    (3, 24, 70, 70),
    (70, 13, 2, 2),
    (0, 8, 4, 4),
    (2, 0, 4, 4),
    (2, 8, 0, 4),
]


def drawn(shape, dtype):
    torch.manual_seed(0)
    x, g = (dense(torch.randn(shape).to(dtype)) for _ in range(2))
    return x, torch.randn(*shape[:2], 1, 1).to(dtype), g


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_input_s_gradient_is_a_product(shape, dtype):
    x, gate, g = drawn(shape, dtype)
    same(ops.gate_grad(g, x, gate)[0], g * gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gate_s_gradient_is_a_sum_rounded_once(shape, dtype):
    x, gate, g = drawn(shape, dtype)
    actual = ops.gate_grad(g, x, gate)[1]
    terms = g.double() * x.double()
    limit = terms.abs().sum((2, 3), keepdim=True) * 8 * 2.0**-24
    expected = terms.sum((2, 3), keepdim=True)
    if dtype == torch.bfloat16:
        limit += expected.abs() * 2.0**-8
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    assert ((actual.double() - expected).abs() <= limit).all()


def test_what_is_not_given_has_no_gradient():
    x, gate, g = drawn((2, 13, 9, 5), torch.float32)
    grad_x, grad_gate = ops.gate_grad(g, x, gate)
    empty = torch.empty(0)
    for actual, expected in [
        (ops.gate_grad(g, None, gate), (grad_x, empty)),
        (ops.gate_grad(g, x), (empty, grad_gate)),
        (ops.gate_grad(g), (empty, empty)),
    ]:
        for one, other in zip(actual, expected, strict=True):
            same(one, other)


def test_nan_and_infinity_stay_in_their_channel():
    x, gate, g = drawn((2, 13, 5, 5), torch.float32)
    x[0, 3, 2, 2] = float("nan")
    g[1, 5, 0, 0] = float("inf")
    grad_x, grad_gate = ops.gate_grad(g, x, gate)
    same(grad_x, g * gate)
    assert (~grad_gate.isfinite()).nonzero()[:, :2].tolist() == [[0, 3], [1, 5]]


def test_other_layouts_are_taken():
    x, gate, g = drawn((2, 13, 5, 5), torch.float32)
    expected = ops.gate_grad(g, x, gate)
    wide = gate.expand(2, 13, 2, 2)[:, :, :1, :1]
    actual = ops.gate_grad(g.contiguous(), x.mT.contiguous().mT, wide)
    for got, wanted in zip(actual, expected, strict=True):
        same(got, wanted)


def test_threads_agree():
    x, gate, g = drawn((3, 100, 70, 30), torch.float32)
    at_one_and_two_threads(lambda: ops.gate_grad(g, x, gate))


@pytest.mark.parametrize(
    ("x", "gate", "message"),
    [
        (
            torch.ones(2, 3),
            torch.ones(2, 3),
            r"grad_output must be \[N, C, H, W\], got size \[2, 3\]",
        ),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3), r"gate must be of size \[2, 3, 1, 1\]"),
        (torch.ones(2, 3, 4, 4), torch.ones(1, 3, 1, 1), r"got \[1, 3, 1, 1\]"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 1, 1).double(), r"gate must be a float32"),
        (
            torch.ones(2, 3, 4, 4).half(),
            torch.ones(2, 3, 1, 1).half(),
            r"grad_output must be a float32",
        ),
    ],
)
def test_bad_arguments_are_named(x, gate, message):
    with pytest.raises(ValueError, match=message):
        ops.gate_grad(x, x, gate)
