"""The strided convolution operators against torch in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import wus_ext  # noqa: F401  (registers torch.ops.wus)
from wus_ext.engine.conv.copies import Form, packed_nbytes

wus = torch.ops.wus

#: Relative L2 error allowed, by kernel size.
TOLERANCE = {1: 1e-6, 3: 4e-6}

#: name: (batch, inputs, outputs, height, width, kernel, stride)
CASES = {
    "typical": (3, 32, 64, 8, 8, 3, (2, 2)),
    "several_panels": (2, 48, 100, 16, 16, 3, (2, 2)),
    "odd_everything": (2, 13, 21, 7, 9, 3, (2, 2)),
    "many_tiles": (5, 8, 9, 37, 31, 3, (2, 2)),
    "rgb": (2, 3, 20, 12, 10, 3, (2, 2)),
    "one_channel": (2, 1, 1, 5, 6, 3, (2, 2)),
    "one_row": (2, 16, 8, 1, 6, 3, (2, 2)),
    "deep": (1, 530, 16, 4, 4, 3, (2, 2)),
    "empty_batch": (0, 8, 8, 6, 6, 3, (2, 2)),
    "pointwise": (3, 32, 64, 8, 8, 1, (2, 2)),
    "pointwise_odd_everything": (2, 13, 21, 7, 9, 1, (2, 2)),
    "pointwise_uneven_stride": (3, 17, 40, 11, 10, 1, (3, 2)),
    "pointwise_long_stride": (2, 16, 8, 5, 9, 1, (7, 4)),
    "pointwise_unit_stride": (2, 20, 33, 6, 5, 1, (1, 1)),
    "pointwise_many_pixels": (2, 8, 32, 40, 150, 1, (2, 2)),
    "pointwise_deep": (1, 530, 16, 4, 4, 1, (2, 2)),
    "pointwise_empty_batch": (0, 8, 8, 6, 6, 1, (2, 2)),
    **{f"size_{n}": (1 + n % 3, 9, 18, n, 18 - n, 3, (2, 2)) for n in range(1, 18)},
    **{f"pointwise_size_{n}": (1 + n % 3, 9, 18, n, 18 - n, 1, (2, 2)) for n in range(1, 18)},
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make_layer(case):
    """Input, weight, bias, and the geometry that torch and the operators both take."""
    batch, inputs, outputs, height, width, kernel, stride = case
    torch.manual_seed(height * 100 + inputs)
    x = torch.randn(batch, inputs, height, width).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, kernel, kernel) / (kernel * inputs**0.5)
    return x, weight, torch.randn(outputs), stride, (kernel // 2, kernel // 2)


def forward(x, weight, bias, stride, padding):
    packed = wus.strided_pack(weight, False)
    return wus.strided_forward(x, packed, bias, weight.size(0), weight.shape[2:], stride, padding)


def dgrad(g, weight, input_size, stride, padding):
    packed = wus.strided_pack(weight, True)
    return wus.strided_dgrad(
        g, packed, weight.size(1), input_size, weight.shape[2:], stride, padding
    )


def expected_dgrad(g, x, weight, stride, padding):
    x = x.double().requires_grad_()
    F.conv2d(x, weight.double(), None, stride, padding).backward(g.double())
    return x.grad


def assert_close(actual, expected, weight):
    assert actual.shape == expected.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    error = (actual.double() - expected).norm()
    assert error <= TOLERANCE[weight.size(2)] * expected.norm()


@cases
@pytest.mark.parametrize("biased", [False, True], ids=["no_bias", "bias"])
def test_forward(case, biased):
    x, weight, bias, stride, padding = make_layer(case)
    bias = bias if biased else None
    expected = F.conv2d(
        x.double(), weight.double(), None if bias is None else bias.double(), stride, padding
    )
    assert_close(forward(x, weight, bias, stride, padding), expected, weight)


@cases
def test_dgrad(case):
    x, weight, _, stride, padding = make_layer(case)
    g = torch.randn_like(F.conv2d(x, weight, None, stride, padding))
    actual = dgrad(g, weight, x.shape[2:], stride, padding)
    assert_close(actual, expected_dgrad(g, x, weight, stride, padding), weight)


@pytest.mark.parametrize("name", ["several_panels", "many_tiles", "pointwise_many_pixels"])
def test_other_layouts(name):
    x, weight, bias, stride, padding = make_layer(CASES[name])
    flipped = weight.transpose(2, 3).contiguous().transpose(2, 3).transpose(0, 1).contiguous()
    y = forward(x, weight, bias, stride, padding)
    assert torch.equal(forward(x.contiguous(), flipped.transpose(0, 1), bias, stride, padding), y)
    g = torch.randn(y.shape)
    assert torch.equal(
        dgrad(g, flipped.transpose(0, 1), x.shape[2:], stride, padding),
        dgrad(
            g.contiguous(memory_format=torch.channels_last), weight, x.shape[2:], stride, padding
        ),
    )


@pytest.mark.parametrize("name", ["several_panels", "many_tiles", "pointwise_many_pixels"])
def test_bits_do_not_depend_on_threads(name):
    x, weight, bias, stride, padding = make_layer(CASES[name])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = forward(x, weight, bias, stride, padding)
            results.append((y, dgrad(y, weight, x.shape[2:], stride, padding)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kernel", [1, 3])
def test_nbytes_tells_what_packing_takes(kernel):
    weight = torch.randn(64, 96, kernel, kernel)
    packed = sum(wus.strided_pack(weight, dgrad).nbytes for dgrad in (False, True))
    assert packed_nbytes(weight, Form("strided")) == packed


@pytest.mark.parametrize("dgrad", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_packing_in_the_place_of_another(kernel, dgrad):
    weight = torch.randn(40, 24, kernel, kernel)
    packed = wus.strided_pack(weight, dgrad)
    again = wus.strided_pack_(torch.full_like(packed, 7), weight, dgrad)
    assert torch.equal(again, packed)
    with pytest.raises(ValueError, match="packed must be what strided_pack made"):
        wus.strided_pack_(packed[:, 1:].contiguous(), weight, dgrad)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    names = "typical or odd_everything or several_panels or uneven_stride or one_channel"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-k", f"(test_forward or test_dgrad) and ({names})"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


X = torch.randn(2, 8, 6, 6)
WEIGHT = torch.randn(16, 8, 3, 3)
PACKED = wus.strided_pack(WEIGHT, False)
ROTATED = wus.strided_pack(WEIGHT, True)
GRAD = torch.randn(2, 16, 3, 3)
GEOMETRY = ((3, 3), (2, 2), (1, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: wus.strided_pack(torch.randn(4, 4, 5, 5), False), ValueError, "weight"),
        (lambda: wus.strided_pack(WEIGHT.double(), False), TypeError, "weight"),
        (lambda: wus.strided_pack(WEIGHT[0], False), ValueError, "weight"),
        (lambda: wus.strided_forward(X[0], PACKED, None, 16, *GEOMETRY), ValueError, "input"),
        (lambda: wus.strided_forward(X, PACKED, None, 80, *GEOMETRY), ValueError, "packed"),
        (lambda: wus.strided_forward(X, PACKED, torch.zeros(3), 16, *GEOMETRY), ValueError, "bias"),
        (
            lambda: wus.strided_forward(X, PACKED, None, 16, (3, 3), (1, 1), (1, 1)),
            ValueError,
            "stride 2 and padding 1",
        ),
        (
            lambda: wus.strided_dgrad(GRAD, ROTATED, 8, (7, 6), *GEOMETRY),
            ValueError,
            "does not belong",
        ),
        (lambda: wus.strided_dgrad(GRAD, ROTATED, 8, (0, 6), *GEOMETRY), ValueError, "input_size"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
