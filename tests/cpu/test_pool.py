import pytest
import torch
import torch.nn.functional as F

import wus_ext  # noqa: F401

from .rows import POOL_SHAPES, at_one_and_two_threads, check_sums, dense, same, values

ops = torch.ops.wus


def reference_code(x, relu):
    pooled, index = F.max_pool2d(x, 2, return_indices=True)
    width = x.shape[3]
    code = (index // width % 2 * 2 + index % width % 2).permute(0, 2, 3, 1)
    if relu:
        code = torch.where((pooled <= 0).permute(0, 2, 3, 1), 4, code)
    return code.to(torch.uint8)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", POOL_SHAPES, ids=str)
def test_relu_max_pool_is_stock(shape, relu, special):
    x = values(shape, special)
    output, code = ops.relu_max_pool(x, relu)
    same(output, F.max_pool2d(x.relu() if relu else x, 2))
    same(code, reference_code(x, relu))
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", POOL_SHAPES, ids=str)
def test_gradient_is_stock(shape, relu, special):
    x = values(shape, special).requires_grad_()
    output = F.max_pool2d(x.relu() if relu else x, 2)
    g = dense(torch.randn(output.shape))
    output.backward(g)
    _, code = ops.relu_max_pool(x.detach(), relu)
    grad_input, grad_bias = ops.max_pool_bias_grad(g, code, x.shape[2:])
    same(grad_input, x.grad)
    check_sums(grad_bias, x.grad)
    nothing, again = ops.max_pool_bias_grad(g, code, x.shape[2:], False)
    assert nothing.numel() == 0
    same(again, grad_bias)


def test_ties_go_to_the_first_and_zeros_pass_nothing():
    x = dense(
        torch.tensor([[1, 1, 0, -0.0], [1, 1, -1, 0], [0, 2, -1, 3], [2, 2, 3, 3]])[None, None]
    )
    _, code = ops.relu_max_pool(x)
    assert code.flatten().tolist() == [0, 4, 1, 1]


def test_threads_agree():
    x = values((8, 40, 17, 15))
    _, code = at_one_and_two_threads(lambda: ops.relu_max_pool(x))
    g = dense(torch.randn(8, 40, 8, 7))
    at_one_and_two_threads(lambda: ops.max_pool_bias_grad(g, code, (17, 15)))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="H and W at least 2"):
        ops.relu_max_pool(torch.randn(1, 3, 1, 4))
    _, code = ops.relu_max_pool(torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"grad_output must be .* got size \[1, 3, 3, 2\]"):
        ops.max_pool_bias_grad(torch.randn(1, 3, 3, 2), code, (4, 4))
    with pytest.raises(ValueError, match="code must be"):
        ops.max_pool_bias_grad(torch.randn(1, 3, 2, 2), code[..., :2], (4, 4))
