import pytest
import torch
import torch.nn.functional as F

import wus_ext  # noqa: F401
from wus_ext.engine.activation import Pool

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


POOLS = [
    Pool(3, 2, 1),
    Pool(3, 2, 0, True),
    Pool(3, 2, 1, True),
    Pool(3, 1, 1),
    Pool(2, 1),
    Pool(2, 2, 1),
    Pool(2, 2, 0, True),
    Pool(3, 3),
    Pool(5, 2, 2),
    Pool(3, 4, 1),
    Pool(15, 2, 7),
]
MAPS = [(2, c, 6, 7) for c in (1, 13, 16, 40)] + [
    *[(2, 9, h, w) for h in (1, 2, 3, 8) for w in (1, 2, 5, 9)],
    (0, 8, 4, 4),
    (70, 16, 3, 3),
    (1, 100, 15, 8),
]


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_any_window_is_stock(pool, relu, special):
    for shape in MAPS:
        if min(shape[2:]) + 2 * pool.padding < pool.kernel:
            continue
        x = values(shape, special).requires_grad_()
        kernel, stride, padding, ceil = pool
        expected, index = F.max_pool2d(
            x.relu() if relu else x, kernel, stride, padding, 1, ceil, return_indices=True
        )
        arguments = list(map(int, pool))
        output, code = ops.relu_max_pool(x.detach(), relu, arguments)
        same(output, expected.detach())
        width, (oh, ow) = shape[3], expected.shape[2:]
        dy = index // width - (torch.arange(oh) * stride - padding)[:, None]
        dx = index % width - (torch.arange(ow) * stride - padding)
        reference = (dy * kernel + dx).permute(0, 2, 3, 1)
        if relu:
            blocked = (expected.detach() <= 0).permute(0, 2, 3, 1)
            reference = torch.where(blocked, kernel * kernel, reference)
        same(code, reference.to(torch.uint8))
        g = dense(torch.randint(-4, 5, expected.shape).float())  # sums are exact in any order
        expected.backward(g)
        grad_input, grad_bias = ops.max_pool_bias_grad(g, code, shape[2:], True, arguments)
        same(grad_input, x.grad)
        check_sums(grad_bias, x.grad)


def test_ties_go_to_the_first_and_zeros_pass_nothing():
    x = dense(
        torch.tensor([[1, 1, 0, -0.0], [1, 1, -1, 0], [0, 2, -1, 3], [2, 2, 3, 3]])[None, None]
    )
    _, code = ops.relu_max_pool(x)
    assert code.flatten().tolist() == [0, 4, 1, 1]


@pytest.mark.parametrize("pool", [Pool(2, 2), Pool(3, 2, 1)], ids=str)
def test_threads_agree(pool):
    pool = list(map(int, pool))
    x = values((8, 40, 17, 15))
    output, code = at_one_and_two_threads(lambda: ops.relu_max_pool(x, True, pool))
    g = dense(torch.randn(output.shape))
    at_one_and_two_threads(lambda: ops.max_pool_bias_grad(g, code, (17, 15), True, pool))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="a map of 1x4 is smaller than a window"):
        ops.relu_max_pool(torch.randn(1, 3, 1, 4))
    with pytest.raises(ValueError, match=r"input must be \[N, C, H, W\]"):
        ops.relu_max_pool(torch.randn(3, 4, 4))
    for bad in ([2, 2, 0], [1, 1, 0, 0], [16, 1, 0, 0], [3, 0, 0, 0], [3, 1, 2, 0]):
        with pytest.raises(ValueError, match="pool must be"):
            ops.relu_max_pool(torch.randn(1, 3, 32, 32), True, bad)
    _, code = ops.relu_max_pool(torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"grad_output must be .* got size \[1, 3, 3, 2\]"):
        ops.max_pool_bias_grad(torch.randn(1, 3, 3, 2), code, (4, 4))
    with pytest.raises(ValueError, match="code must be"):
        ops.max_pool_bias_grad(torch.randn(1, 3, 2, 2), code[..., :2], (4, 4))
