import pytest
import torch
import torch.nn.functional as F

import wus_ext  # noqa: F401

from .rows import SHAPES, at_one_and_two_threads, dense, pack, same, values

ops = torch.ops.wus


def stock(x, p, relu):
    torch.manual_seed(3)
    return F.dropout(x.relu() if relu else x, p, training=True)


def ours(x, p, relu):
    torch.manual_seed(3)
    return (ops.relu_dropout_mask if relu else ops.dropout_mask)(x, p)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_seed_same_output_and_gradient(shape, p, relu):
    x = values(shape).requires_grad_()
    expected = stock(x, p, relu)
    after_stock = torch.get_rng_state()
    output, mask = ours(x.detach(), p, relu)
    assert torch.equal(torch.get_rng_state(), after_stock)
    same(output, expected.detach())
    g = dense(torch.randn(shape))
    expected.backward(g)
    scale = 1 / (1 - p) if p < 1 else 0.0
    torch.testing.assert_close(ops.apply_mask(g, mask, scale), x.grad, rtol=2e-7, atol=0)
    if x.numel():
        same(mask, pack(stock(torch.ones_like(x), p, False) * (~(x <= 0) if relu else 1) > 0))


@pytest.mark.parametrize("relu", [False, True])
def test_nan_and_infinity_are_stock(relu):
    x = values((2, 13, 5, 5), special=True)
    same(ours(x, 0.4, relu)[0], stock(x, 0.4, relu))


def test_same_draws_for_a_contiguous_input():
    x = torch.randn(2, 13, 5, 5)
    same(ours(x, 0.5, False)[0], stock(x, 0.5, False))


def test_generator_is_used():
    x = torch.ones(4, 100)
    first, _ = ops.dropout_mask(x, 0.5, torch.Generator().manual_seed(1))
    second, _ = ops.dropout_mask(x, 0.5, torch.Generator().manual_seed(1))
    other, _ = ops.dropout_mask(x, 0.5, torch.Generator().manual_seed(2))
    same(first, second)
    assert not torch.equal(first, other)


def test_threads_agree():
    x = torch.randn(600, 133)
    _, mask = at_one_and_two_threads(lambda: ours(x, 0.5, True))
    at_one_and_two_threads(lambda: [ops.apply_mask(x, mask, 2.0)])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"p must be .* got 1.5"):
        ops.dropout_mask(torch.ones(3, 3), 1.5)
