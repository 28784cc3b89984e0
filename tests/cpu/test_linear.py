"""The products of linear layers against torch in float64."""

from __future__ import annotations

import pytest
import torch

import wus_ext  # noqa: F401  (registers torch.ops.wus)

from .rows import at_one_and_two_threads

wus = torch.ops.wus

#: name: (batch, in_features, out_features)
CASES = {
    "typical": (64, 640, 320),
    "odd_everything": (33, 77, 101),
    "deep": (5, 1100, 40),
    "wide": (3, 1100, 1300),
    "high": (3, 40, 1300),
    "many_rows": (300, 50, 60),
    "one_of_each": (1, 1, 1),
    "one_row": (1, 530, 70),
    "one_input": (40, 1, 70),
    "one_output": (40, 70, 1),
    "empty_batch": (0, 8, 16),
    "no_inputs": (4, 0, 16),
    "no_outputs": (4, 16, 0),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make(case):
    batch, inputs, outputs = case
    torch.manual_seed(batch + inputs)
    x, weight = torch.randn(batch, inputs), torch.randn(outputs, inputs) / max(inputs, 1) ** 0.5
    return x, weight, torch.randn(outputs), torch.randn(batch, outputs)


def assert_close(actual, expected, terms):
    """Within the rounding of sums of `terms` products, which grows as a random walk does."""
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    error = (actual.double() - expected).norm()
    assert error <= 2.0**-24 * (2 + terms**0.5) * expected.norm()


@cases
@pytest.mark.parametrize("biased", [False, True], ids=["no_bias", "bias"])
def test_forward(case, biased):
    x, weight, bias, _ = make(case)
    expected = x.double() @ weight.double().t() + (bias.double() if biased else 0)
    actual = wus.linear_forward(x, weight, bias if biased else None)
    assert_close(actual, expected, case[1])


@cases
def test_dgrad(case):
    _, weight, _, grad = make(case)
    assert_close(wus.linear_dgrad(grad, weight), grad.double() @ weight.double(), case[2])


@pytest.mark.parametrize("name", ["typical", "odd_everything"])
def test_other_layouts(name):
    x, weight, bias, grad = make(CASES[name])

    def strided(matrix):
        return torch.stack([matrix, matrix], 2)[..., 0].t().contiguous().t()

    spaced = torch.stack([bias, bias], 1)[:, 0]
    assert torch.equal(
        wus.linear_forward(strided(x), strided(weight), spaced),
        wus.linear_forward(x, weight, bias),
    )
    assert torch.equal(
        wus.linear_dgrad(strided(grad), strided(weight)), wus.linear_dgrad(grad, weight)
    )


@pytest.mark.parametrize("name", ["typical", "wide", "high", "many_rows"])
def test_bits_do_not_depend_on_threads(name):
    x, weight, bias, grad = make(CASES[name])
    at_one_and_two_threads(
        lambda: (wus.linear_forward(x, weight, bias), wus.linear_dgrad(grad, weight))
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value):
    x, weight, bias, grad = make(CASES["typical"])
    x[5, 7] = grad[5, 7] = value
    for output in (wus.linear_forward(x, weight, bias), wus.linear_dgrad(grad, weight)):
        assert not output[5].isfinite().any()
        assert output[:5].isfinite().all()
        assert output[6:].isfinite().all()


X, WEIGHT, BIAS, GRAD = make((4, 6, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: wus.linear_forward(X[0], WEIGHT), ValueError, "input must have 2 dimensions"),
        (lambda: wus.linear_forward(X, WEIGHT.double()), TypeError, "weight must be float32"),
        (lambda: wus.linear_forward(X[:, 1:], WEIGHT), ValueError, "input must have 6 features"),
        (lambda: wus.linear_forward(X, WEIGHT, BIAS[1:]), ValueError, "bias must have 3 features"),
        (lambda: wus.linear_forward(X, WEIGHT, X), ValueError, "bias must have 1 dimension,"),
        (lambda: wus.linear_dgrad(GRAD[0], WEIGHT), ValueError, "grad_output must have 2"),
        (lambda: wus.linear_dgrad(GRAD.half(), WEIGHT), TypeError, "grad_output must be float32"),
        (lambda: wus.linear_dgrad(X, WEIGHT), ValueError, "grad_output must have 3 features"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
