"""Values in the middle of a chain that somebody holds: the chain goes on behind them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wus_ext

from .chains import check, frozen, fused_chains, images

ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class HeldImage(nn.Module):
    def __init__(self, activation=F.relu, residual=False, pool=False):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.activation, self.residual, self.pool = activation, residual, pool

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        y = self.conv(x)
        z = self.norm(y)
        if self.residual:
            z = z + x
        z = self.activation(z)
        if self.pool:
            return F.max_pool2d(z, 3, 2, 1) + F.max_pool2d(y, 3, 2, 1)
        return torch.cat([y, z], 1)


class HeldProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(360, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.flatten(1))
        return torch.cat([y, F.dropout(F.relu(y), 0.3, self.training)], 1)


def pair(model: nn.Module, training: bool) -> tuple[nn.Module, nn.Module]:
    """A stock model frozen stock's way, and its converted twin in a skip window."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    stock = model.to(memory_format=torch.channels_last).train(training)
    skip = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(skip, True)
    return frozen(stock), skip


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_front_of_a_norm_and_an_activation(activation, training):
    stock, skip = pair(HeldImage(ACTIVATIONS[activation]), training)
    check(stock, skip, images(), 1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("residual", "pool"), [(True, False), (False, True)])
def test_in_front_of_a_sum_and_a_pool(residual, pool, training):
    stock, skip = pair(HeldImage(residual=residual, pool=pool), training)
    check(stock, skip, images(), 1e-5)
    assert "conv" in fused_chains(skip, images())


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_in_front_of_an_activation_and_dropout(training):
    stock, skip = pair(HeldProduct(), training)
    check(stock, skip, images(), 1e-5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_in_place(approximate):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.gelu_(self.conv(x), approximate=approximate)

    stock, skip = pair(InPlace(), True)
    check(stock, skip, images(), 1e-5)
    assert fused_chains(skip, images())[0].startswith("conv gelu")


def test_a_value_picked_from():
    """By an operator that takes a list of tensors some of which are none."""

    class Picked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return F.relu(y[:, torch.tensor([5, 0, 2])]) + y.amax()

    stock, skip = pair(Picked(), True)
    check(stock, skip, images(), 1e-5)
