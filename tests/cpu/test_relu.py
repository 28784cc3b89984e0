import pytest
import torch

import wus_ext  # noqa: F401  (registers torch.ops.wus)

from .rows import SHAPES, at_one_and_two_threads, check_sums, dense, pack, same, values

ops = torch.ops.wus


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu_mask_is_stock_relu(shape, special):
    x = values(shape, special)
    output, mask = ops.relu_mask(x)
    same(output, x.relu())
    same(mask, pack(~(x <= 0)))
    assert dense(output).data_ptr() == output.data_ptr()


def test_relu_mask_in_place():
    x = values((2, 13, 3, 5), special=True)
    expected, expected_mask = ops.relu_mask(x)
    output, mask = ops.relu_mask_(x)
    assert output.data_ptr() == x.data_ptr()
    same(x, expected)
    same(mask, expected_mask)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_relu_mask(shape):
    x, z = values(shape, special=True), values(shape)
    output, mask = ops.add_relu_mask(x, z)
    same(output, (x + z).relu())
    same(mask, pack(~(x + z <= 0)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_bias_grad(shape):
    x, g = values(shape, special=True), dense(torch.randn(shape))
    y, mask = ops.relu_mask(x)
    expected = torch.ops.aten.threshold_backward(g, y, 0)
    grad_input, grad_bias = ops.mask_bias_grad(g, mask)
    same(grad_input, expected)
    check_sums(grad_bias, expected)
    nothing, again = ops.mask_bias_grad(g, mask, False)
    assert nothing.numel() == 0
    same(again, grad_bias)
    _, plain = ops.mask_bias_grad(g)
    check_sums(plain, g)


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_a_blocked_gradient_is_zero_whatever_it_was(special):
    x = torch.tensor([[-1.0, 1.0, 0.0, -0.0, float("nan")]])
    _, mask = ops.relu_mask(x)
    grad_input, grad_bias = ops.mask_bias_grad(torch.full((1, 5), special), mask)
    same(grad_input, torch.tensor([[0, special, 0, 0, special]]))
    same(grad_bias, grad_input[0])


def test_gradient_of_any_strides():
    x = values((2, 13, 4, 4))
    _, mask = ops.relu_mask(x)
    g = torch.randn(2, 13, 4, 4)
    views = {
        "nchw": g,
        "sliced": torch.stack([g, g], -1)[..., 0],
        "expanded": g[:, :, :1, :1].expand(2, 13, 4, 4),
    }
    for view in views.values():
        for result, expected in zip(
            ops.mask_bias_grad(view, mask), ops.mask_bias_grad(dense(view), mask), strict=True
        ):
            same(result, expected)


def test_sum_is_exact_over_many_rows_and_for_any_number_of_threads():
    g = torch.rand(50_000, 24) + 0.5
    (_, total) = at_one_and_two_threads(lambda: ops.mask_bias_grad(g))
    torch.testing.assert_close(total.double(), g.double().sum(0), rtol=3e-7, atol=0)


def test_threads_agree():
    x, g = values((8, 100, 16, 16)), dense(torch.randn(8, 100, 16, 16))
    _, mask = at_one_and_two_threads(lambda: ops.relu_mask(x))
    at_one_and_two_threads(lambda: ops.mask_bias_grad(g, mask))


def test_bad_arguments_are_named():
    x = values((2, 8, 3, 3))
    _, mask = ops.relu_mask(x)
    with pytest.raises(ValueError, match=r"input must be a float32 .* got Double"):
        ops.relu_mask(x.double())
    with pytest.raises(ValueError, match=r"mask must be .* \[18, 1\].* got Byte of size \[17, 1\]"):
        ops.mask_bias_grad(x, mask[:17])
    with pytest.raises(ValueError, match="input must be dense"):
        ops.relu_mask_(torch.randn(2, 8, 3, 3))
    with pytest.raises(ValueError, match="other has size"):
        ops.add_relu_mask(x, x[:1])
