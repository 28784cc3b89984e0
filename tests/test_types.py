"""Complex tensors, and tensors whose types do not fit together, as stock PyTorch has them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wus_ext
from tests.cases import CONV_CASES, CONV_TRANSPOSE_CASES, LINEAR_SHAPES
from wus_ext import functional

COMPLEX = [torch.complex64, torch.complex128]
CONVOLUTIONS = [case for case in CONV_CASES + CONV_TRANSPOSE_CASES if case.input[0] != 0]
convolutions = pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
dtypes = pytest.mark.parametrize("dtype", COMPLEX, ids=str)


def operands(case, dtype):
    x, weight = torch.randn(case.input, dtype=dtype), torch.randn(case.weight, dtype=dtype)
    return x, weight, torch.randn(case.out_channels, dtype=dtype) if case.bias else None


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def check(ours, stock, x, weight, bias):
    """Output and gradients of input and bias are stock's, and the weight has none."""
    mine, theirs = leaves(x, weight, bias), leaves(x, weight, bias)
    output, expected = ours(*mine), stock(*theirs)
    grad_output = torch.randn_like(expected)
    output.backward(grad_output)
    expected.backward(grad_output)
    tolerance = 1e-5 if x.dtype == torch.complex64 else 1e-12
    close = {"rtol": tolerance, "atol": 20 * tolerance}
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(mine[0].grad, theirs[0].grad, **close)
    assert mine[1].grad is None
    if bias is not None:
        torch.testing.assert_close(mine[2].grad, theirs[2].grad, **close)


@dtypes
@convolutions
def test_complex_convolutions(case, dtype):
    def ours(x, weight, bias):
        return getattr(functional, case.op)(x, weight, bias, skip_wgrad=True, **case.options)

    def stock(x, weight, bias):
        return getattr(F, case.op)(x, weight, bias, **case.options)

    check(ours, stock, *operands(case, dtype))


@convolutions
def test_complex_gradients_and_second_ones(case):
    x, weight, bias = operands(case, torch.complex128)
    inputs = [t.requires_grad_() for t in (x, bias) if t is not None]

    def ours(x, bias=None):
        return getattr(functional, case.op)(x, weight, bias, skip_wgrad=True, **case.options)

    assert torch.autograd.gradcheck(ours, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, inputs, fast_mode=True)


@dtypes
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", LINEAR_SHAPES.values(), ids=LINEAR_SHAPES)
def test_complex_linear(shape, biased, dtype):
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(7, shape[-1], dtype=dtype)
    bias = torch.randn(7, dtype=dtype) if biased else None
    check(
        lambda x, weight, bias: functional.linear(x, weight, bias, skip_wgrad=True),
        F.linear, x, weight, bias,
    )  # fmt: skip
    if dtype == torch.complex128:
        inputs = [t.requires_grad_() for t in (x, bias) if t is not None]

        def ours(x, bias=None):
            return functional.linear(x, weight, bias, skip_wgrad=True)

        assert torch.autograd.gradcheck(ours, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(ours, inputs, fast_mode=True)


@dtypes
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_complex_layers(dtype, mode):
    torch.manual_seed(0)
    model = wus_ext.convert(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode, dtype=dtype),
            nn.ConvTranspose2d(4, 3, 2, stride=2, dtype=dtype),
            nn.Linear(8, 5, dtype=dtype),
        )
    )
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    grad_output = torch.randn(2, 3, 8, 5, dtype=dtype)
    grads = []
    for skip in (False, True):
        model.zero_grad()
        wus_ext.set_skip(model, skip)
        given = x.clone().requires_grad_()
        model(given).backward(grad_output)
        grads.append([given.grad, *(layer.bias.grad for layer in model)])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert all(layer.weight.grad is None for layer in model)


@pytest.mark.parametrize("op", ["convolution", "linear"])
def test_complex_operators_are_whole(op):
    """What torch.compile asks of an operator."""
    if op == "linear":
        given, rest = leaves(torch.randn(5, 4).cdouble(), torch.randn(3, 4).cdouble()), ()
        given.append(torch.randn(3).cdouble().requires_grad_())
    else:
        given = leaves(torch.randn(2, 4, 6).cdouble(), torch.randn(3, 4, 3).cdouble())
        given.append(torch.randn(3).cdouble().requires_grad_())
        rest = ([1], [1], [1], False, [0], 1)
    torch.library.opcheck(getattr(torch.ops.wus, op), (*given, *rest))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_complex_without_autograd(context):
    x, weight = torch.randn(1, 2, 5, 5).cfloat() * 1j, torch.randn(3, 2, 3, 3).cfloat()
    with context():
        actual = functional.conv2d(x, weight, skip_wgrad=True)
        torch.testing.assert_close(actual, F.conv2d(x, weight))


def test_a_conjugated_weight():
    """A view that conjugates when it is read."""
    x, weight = torch.randn(2, 3, 5, dtype=torch.cdouble), torch.randn(4, 3, 2).cdouble() * 1j
    check(
        lambda x, weight, bias: functional.conv1d(x, weight.conj(), bias, skip_wgrad=True),
        lambda x, weight, bias: F.conv1d(x, weight.conj(), bias), x, weight, None,
    )  # fmt: skip


# --- types that do not fit ----------------------------------------------------------------------

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64]


def outcome(function, *operands):
    try:
        return function(*operands).dtype
    except (RuntimeError, NotImplementedError):
        return "refused"


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "inference"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("op", ["conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear"])
def test_types_that_stock_refuses_are_refused(op, dtype, grad):
    size = (3,) * (int(op[-2]) if op != "linear" else 0)
    ours, stock = getattr(functional, op), getattr(F, op)
    for weight_type, bias_type in itertools.product(TYPES, [*TYPES, None]):
        if len({dtype, weight_type, bias_type} - {None}) > 2:
            continue
        x = torch.ones(1, 2, *size).to(dtype)
        weight = torch.ones(2, 2, *size).to(weight_type)
        bias = None if bias_type is None else torch.ones(2).to(bias_type)
        with torch.inference_mode(not grad):
            expected = outcome(stock, x, weight, bias)
            actual = outcome(lambda *given: ours(*given, skip_wgrad=True), x, weight, bias)
        assert actual == expected, (dtype, weight_type, bias_type)


def test_what_does_not_fit_is_named():
    x, weight = torch.ones(1, 2, 3, 3).double(), torch.ones(2, 2, 3, 3).double()
    for bias_type in (torch.float32, torch.float16):
        bias = torch.ones(2, dtype=bias_type)
        with pytest.raises(RuntimeError, match=r"Input type \(Double\) and bias type"):
            functional.conv2d(x, weight, bias, skip_wgrad=True)
    with pytest.raises(RuntimeError, match=r"Input type \(ComplexDouble\) and weight type"):
        functional.conv2d(x * 1j, weight, skip_wgrad=True)
