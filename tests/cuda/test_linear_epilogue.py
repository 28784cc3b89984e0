"""cuBLASLt's epilogues for linear layers against two passes: emulated by a strict stand-in whose
masks nobody else can read, and by cuBLASLt itself where there is a GPU."""

import pytest
import torch
import torch.nn.functional as F

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Samples, features in, out and of the layer above; out fills 128 bits of mask or not.
SHAPES = [(4, 8, 16, 8), (37, 24, 136, 40), (1, 128, 128, 16), (130, 64, 256, 512)]

pytestmark = [
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.usefixtures("tf32_products"),
]


def layer(gpu, shape, dtype):
    samples, features, out, above = shape
    x = gpu(torch.randn(samples, features).to(dtype))
    weight = gpu((torch.randn(out, features) / features**0.5).to(dtype))
    bias = gpu(torch.randn(out).to(dtype))
    weight_above = gpu((torch.randn(above, out) / above**0.5).to(dtype))
    g = gpu(torch.randn(samples, above).to(dtype))
    return x, weight, bias, weight_above, g


def need(gpu, x, out, above):
    if not gpu.ops.linear_epilogues_exist(x, out, above, True):
        assert gpu.device == "cuda", "the stand-in has them all"
        pytest.skip("this cuBLASLt has no such product")


def close(actual, exact, eps, terms):
    """Within the rounding of products of `terms` numbers about one, and of the result's type."""
    error = (actual.double() - exact).abs()
    bound = 2 * eps * exact.abs() + 4 * eps * terms**0.5
    assert (error <= bound).all(), f"error {(error / bound).max():.1e} of the bound"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_passes(gpu, shape, dtype):
    x, weight, bias, weight_above, g = layer(gpu, shape, dtype)
    samples, _, out, above = shape
    need(gpu, x, out, above)
    output, aux = gpu.ops.linear_relu_aux(x, weight, bias, True)
    eps = torch.finfo(dtype).eps if dtype != torch.float32 or gpu.device == "cpu" else 2e-3
    exact = F.linear(x.double(), weight.double(), bias.double())
    close(output, exact.relu(), eps, 1)
    assert aux.shape == (samples, (out + 127) // 128 * 16)
    assert aux.dtype == torch.uint8
    grad_input, grad_bias = gpu.ops.linear_drelu_bgrad(g, weight_above, aux, True)
    # An element next to zero may be rounded to either side before ReLU looks at it.
    passes = torch.where(exact.abs() > 8 * eps, exact > 0, output > 0)
    expected = (g.double() @ weight_above.double()) * passes
    close(grad_input, expected, eps, 1)
    close(grad_bias, expected.sum(0), eps, samples)
    assert grad_bias.dtype == dtype
    again = gpu.ops.linear_drelu_bgrad(g, weight_above, aux, True)
    assert torch.equal(again[0], grad_input)
    assert torch.equal(again[1], grad_bias)


def test_infinity_stops_at_a_closed_relu(gpu, dtype):
    """Selected, not multiplied: zero times infinity would be NaN."""
    x, weight, bias, weight_above, g = layer(gpu, SHAPES[1], dtype)
    need(gpu, x, *SHAPES[1][2:])
    output, aux = gpu.ops.linear_relu_aux(x, weight, bias, True)
    infinite = torch.full_like(g, float("inf"))
    grad_input, _ = gpu.ops.linear_drelu_bgrad(infinite, weight_above.abs() + 0.1, aux, True)
    assert torch.equal(grad_input, torch.where(output > 0, float("inf"), 0.0).to(dtype))


def test_operands_that_are_not_aligned_or_dense(gpu, dtype):
    x, weight, bias, weight_above, g = layer(gpu, SHAPES[0], dtype)
    need(gpu, x, *SHAPES[0][2:])
    moved = torch.cat([bias[:1], bias])[1:]
    assert moved.data_ptr() % 16
    expected = gpu.ops.linear_relu_aux(x, weight, bias, True)
    output, aux = gpu.ops.linear_relu_aux(x.t().contiguous().t(), weight, moved, True)
    assert torch.equal(output, expected[0])
    exact = gpu.ops.linear_drelu_bgrad(g, weight_above, aux, True)
    columns = gpu.ops.linear_drelu_bgrad(g.t().contiguous().t(), weight_above, aux, True)
    assert all(map(torch.equal, exact, columns))


def test_products_that_do_not_exist(gpu, dtype):
    x = gpu(torch.randn(0, 8).to(dtype))
    assert not gpu.ops.linear_epilogues_exist(x, 8, 8, True)
    if gpu.device == "cuda":
        return
    x = torch.randn(4, 8).to(dtype)
    assert gpu.ops.linear_epilogues_exist(x, 8, 8, True)
    assert not gpu.ops.linear_epilogues_exist(x, 10, 8, True)
    assert not gpu.ops.linear_epilogues_exist(x, 8, 10, True)
    with pytest.raises(RuntimeError, match="no such product for 4 samples, 8 features in and 10"):
        gpu.ops.linear_relu_aux(x, torch.randn(10, 8).to(dtype), torch.randn(10).to(dtype), True)


def test_wrong_operands_are_named(gpu, dtype):
    x, weight, bias, weight_above, g = layer(gpu, SHAPES[0], dtype)
    with pytest.raises(ValueError, match=r"weight must be \[\*, 8\]"):
        gpu.ops.linear_relu_aux(x, weight[:, :4], bias, True)
    with pytest.raises(ValueError, match=r"bias must be \[16\]"):
        gpu.ops.linear_relu_aux(x, weight, bias.double(), True)
    with pytest.raises(ValueError, match="aux must be a contiguous uint8 tensor"):
        gpu.ops.linear_drelu_bgrad(g, weight_above, gpu(torch.zeros(4, 2, dtype=torch.uint8)), True)
