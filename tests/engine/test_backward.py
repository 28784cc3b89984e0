"""The backward pass of a chain: what is saved for it, where it ends, when it runs twice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wus_ext

from .chains import build, images, saved_bytes


@pytest.mark.parametrize(("name", "part"), [("conv_relu", 0.04), ("conv_relu_pool", 0.2)])
def test_masks_are_saved_instead_of_activations(name, part):
    stock, skip = build(name)
    stocks, _ = saved_bytes(stock, images((4, 3, 16, 16)))
    ours, _ = saved_bytes(skip, images((4, 3, 16, 16)))
    assert 0 < ours <= part * stocks


def check_gradients(stock, skip, x):
    """Gradients of parameters only, of an input without one."""
    expected = stock(x)
    grad_output = torch.randn_like(expected)
    expected.backward(grad_output)
    skip(x).backward(grad_output)
    for (name, mine), theirs in zip(skip.named_parameters(), stock.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert (mine.grad - theirs.grad).norm() < 2e-4 * (1 + theirs.grad.norm()), name


@pytest.mark.parametrize("name", ["conv_norm_relu", "conv_norm_relu_pool", "norm_options"])
def test_a_norm_without_an_input_gradient_keeps_its_mask_only(name):
    stock, skip = build(name)
    x = images()
    z = stock[0](x).nbytes
    assert saved_bytes(skip, x)[0] <= saved_bytes(skip, x.clone().requires_grad_())[0] - z
    check_gradients(stock, skip, x)
    for norm in stock:
        if isinstance(norm, nn.BatchNorm2d):
            norm.requires_grad_(True)
    stock.zero_grad()
    skip = wus_ext.convert(copy.deepcopy(stock), skip_gamma=False)
    wus_ext.set_skip(skip, True)
    check_gradients(stock, skip, x)


def test_a_residual_without_an_input_gradient():
    stock, skip = build("block")
    first = ["0", "2.conv1", "2.bn1"]
    wus_ext.set_skip(skip, True, layers=first, skip_biases=True)
    for name in first:
        stock.get_submodule(name).requires_grad_(False)
    check_gradients(stock, skip, images())
    assert stock[2].down[1].bias.grad is not None
    assert stock[2].bn2.bias.grad is not None


def test_double_backward_through_a_fused_chain_is_an_error():
    _, skip = build("conv_relu")
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match="fuse=False"):
        torch.autograd.grad(skip(x).sum(), x, create_graph=True)


def test_double_backward_works_layer_by_layer():
    stock, skip = build("conv", fuse=False)
    images_of_both = images()
    for model in (stock, skip):
        x = images_of_both.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    for (name, mine), (_, theirs) in zip(
        skip.named_parameters(), stock.named_parameters(), strict=True
    ):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)
