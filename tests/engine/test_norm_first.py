"""A batch norm that begins a chain, and where it must not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import wus_ext

from .chains import fused_chains, images, run, worst_error


def network():
    torch.manual_seed(0)
    layers = nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.Sigmoid()
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def steps(model):
    """The chains of a full step of layers that run fused."""
    return fused_chains(model, images())


def test_it_begins_a_chain():
    model = wus_ext.convert(network(), full="fused")
    assert steps(model) == ["norm relu", "conv sigmoid"]
    assert worst_error(network(), wus_ext.convert(network(), full="fused"), images()) < 1e-5


def test_stock_full_steps_are_stock_bit_for_bit():
    stock, ours = network(), wus_ext.convert(network())
    x = images()
    expected, actual = run(stock, x), run(ours, x)
    assert all(map(torch.equal, actual, expected))
    assert torch.equal(ours[1].weight.grad, stock[1].weight.grad)


@pytest.mark.parametrize("channels_last", [True, False])
def test_only_in_channels_last(channels_last):
    model = wus_ext.convert(network(), full="fused")
    x = images(channels_last=channels_last)
    chains = fused_chains(model, x)
    assert chains[-1] == "conv sigmoid"
    assert len(chains) == 1 + channels_last
    assert worst_error(network(), wus_ext.convert(network(), full="fused"), x) < 1e-5


def behind_a_convolution():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def pruned(norm):
    return prune.l1_unstructured(norm, "weight", 1)


def without_a_buffer(norm):
    mean = norm.running_mean
    del norm.running_mean
    norm.running_mean = mean
    return norm


def without_a_count(norm):
    norm.num_batches_tracked = None
    norm.momentum = None
    return norm


@pytest.mark.parametrize("change", [pruned, without_a_buffer, without_a_count])
@pytest.mark.parametrize("first", [True, False], ids=["first", "behind a convolution"])
@pytest.mark.parametrize("skip", [True, False], ids=["skip", "fused"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_parameters_and_buffers_that_are_something_else(change, first, skip, training):
    stock, ours = (network() if first else behind_a_convolution() for _ in range(2))
    for model in (stock, ours):
        change(next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)))
    wus_ext.set_skip(wus_ext.convert(ours, full="fused"), skip)
    for model in (stock, ours):
        model.train(training)
    x = images()
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm3d])
def test_other_ranks_refuse_images_as_stock_does(kind):
    stock = nn.Sequential(nn.ReLU(), kind(3))
    ours = wus_ext.convert(copy.deepcopy(stock), full="fused")
    for skip in (False, True):
        wus_ext.set_skip(ours, skip)
        for model in (stock, ours):
            with pytest.raises(ValueError, match=r"expected .*D"):
                model(images())


def test_no_chain_without_gradients_or_batch_statistics():
    model = wus_ext.convert(network(), full="fused")
    model.eval()
    assert steps(model) == ["conv sigmoid"]
