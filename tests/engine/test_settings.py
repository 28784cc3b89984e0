"""The settings of convert: frozen statistics, scales that train, bad values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wus_ext

from .chains import build, check, images, run


@pytest.mark.parametrize("name", ["conv_norm_relu", "block", "conv_norm_relu_pool", "functional"])
def test_frozen_statistics(name):
    """norm="frozen" is stock with the norm layers in evaluation mode."""
    stock, skip = build(name, norm="frozen")
    run(stock, images())
    skip.load_state_dict(stock.state_dict())
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    check(stock, skip, images(), tolerance=3e-5)


@pytest.mark.parametrize("fuse", [True, False])
def test_frozen_statistics_layer_by_layer_too(fuse):
    _, skip = build("conv_norm_relu", norm="frozen", fuse=fuse)
    before = copy.deepcopy(dict(skip.named_buffers()))
    run(skip, images())
    for name, buffer in skip.named_buffers():
        assert torch.equal(buffer, before[name]), name
    wus_ext.set_skip(skip, False)
    run(skip, images())
    assert not torch.equal(skip[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize("name", ["conv_norm_relu", "block"])
def test_gamma_trains_if_asked(name):
    stock, skip = build(name, skip_gamma=False)
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_()
    check(stock, skip, images(), tolerance=2e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "running"}, "norm: 'running' is not one of batch, frozen"),
        ({"algo": "fft"}, "algo: 'fft' is not one of auto, measure, direct, f2, f4"),
        ({"memory_budget": -1}, "memory_budget: expected a number of bytes"),
        ({"memory_budget": 1.5}, "memory_budget: expected a number of bytes"),
        ({"fuse": 1}, "fuse: expected True or False"),
        ({"norm": "frozen", "skip_gamma": False}, "norm='frozen' needs skip_gamma=True"),
        ({"skip_gamma": None}, "skip_gamma: expected True or False"),
    ],
)
def test_bad_settings_are_named(settings, message):
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match=message):
        wus_ext.convert(model, **settings)
    assert type(model) is nn.Conv2d
