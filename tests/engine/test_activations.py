"""Activations and max-pools that chains take in, behind every kind of convolution and linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wus_ext

from .chains import check, fused_chains, images, saved_bytes

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
}
IN_PLACE = {
    "relu6": nn.ReLU6(True),
    "leaky_relu": nn.LeakyReLU(0.2, True),
    "hardsigmoid": nn.Hardsigmoid(True),
    "hardswish": nn.Hardswish(True),
    "silu": nn.SiLU(True),
}
CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 16},
    "5x5": {"kernel_size": 5, "padding": 2},
}
modes = pytest.mark.parametrize("full", [False, True], ids=["skip", "full"])


def twins(*layers, full):
    """A stock model and its converted twin; in skip steps the stock one is frozen stock's way."""
    torch.manual_seed(0)
    stock = copy.deepcopy(nn.Sequential(*layers)).to(memory_format=torch.channels_last)
    for module in stock.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fused = wus_ext.convert(copy.deepcopy(stock), full="fused")
    if not full:
        wus_ext.set_skip(fused, True)
        for name, parameter in stock.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    return stock, fused


@modes
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_behind_a_convolution(name, norm, kind, full):
    between = [nn.BatchNorm2d(16)] if norm else []
    layers = nn.Conv2d(16, 16, **CONVOLUTIONS[kind]), *between, ACTIVATIONS[name]
    stock, fused = twins(*layers, full=full)
    check(stock, fused, x := images((3, 16, 12, 10)), tolerance=2e-5)
    assert fused_chains(fused, x) == [f"conv {'norm ' if norm else ''}{name}"]


@modes
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_behind_a_linear_layer(name, full):
    stock, fused = twins(nn.Linear(20, 30), ACTIVATIONS[name], nn.Linear(30, 4), full=full)
    check(stock, fused, x := torch.randn(6, 20), tolerance=2e-5)
    assert fused_chains(fused, x) == [f"linear {name}", "linear"]


@modes
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name, full):
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), IN_PLACE[name], nn.Conv2d(8, 4, 1)
    stock, fused = twins(*layers, full=full)
    check(stock, fused, x := images(), tolerance=2e-5)
    assert fused_chains(fused, x) == [f"conv norm {name}", "conv"]


@modes
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_behind_a_sum(name, full):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.act = ACTIVATIONS[name]

        def forward(self, x):
            return self.act(self.norm(self.conv(x)) + x)

    stock, fused = twins(Block(), full=full)
    check(stock, fused, x := images(), tolerance=2e-5)
    smooth = name in ("hardswish", "silu", "sigmoid", "gelu", "gelu_tanh")
    assert fused_chains(fused, x) == ["conv norm add" if smooth else f"conv norm add {name}"]


@pytest.mark.parametrize(
    "activation",
    [nn.Hardtanh(), nn.Hardtanh(0, 5.5), nn.LeakyReLU(-0.5), nn.LeakyReLU(0.0), nn.ELU()],
    ids=repr,
)
def test_others_run_by_themselves(activation):
    stock, fused = twins(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 4, 1), full=True)
    check(stock, fused, x := images(), tolerance=2e-5)
    assert fused_chains(fused, x) == ["conv", "conv"]


def test_bits_are_saved_where_two_slopes_are_all_there_is():
    x = images((2, 16, 32, 32)).requires_grad_()
    elements = 2 * 16 * 32 * 32
    for name, activation in ACTIVATIONS.items():
        _, fused = twins(nn.Conv2d(16, 16, 1), activation, full=False)
        bits = name in ("relu", "relu6", "leaky_relu", "hardsigmoid")
        assert saved_bytes(fused, x)[0] == elements // 8 if bits else elements * 4, name


def test_a_smooth_activation_behind_a_norm_saves_no_input_of_its_own():
    x = images((2, 16, 32, 32)).requires_grad_()
    _, fused = twins(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.SiLU(), full=False)
    channels = 16 * 4 * 8
    assert saved_bytes(fused, x)[0] <= 2 * 16 * 32 * 32 * 4 + channels


POOLS = {
    "stem": (nn.MaxPool2d(3, 2, 1), True),
    "ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), True),
    "overlapping": (nn.MaxPool2d(3, 1, 1), True),
    "large": (nn.MaxPool2d(5), True),
    "oblong": (nn.MaxPool2d((2, 3)), False),
    "dilated": (nn.MaxPool2d(2, 2, dilation=2), False),
    "indices": (nn.MaxPool2d(2, return_indices=True), False),
}


class First(nn.Module):
    def forward(self, pooled):
        return pooled[0] if isinstance(pooled, tuple) else pooled


@modes
@pytest.mark.parametrize("order", ["relu pool", "pool relu", "pool"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("name", POOLS)
def test_pools(name, norm, order, full):
    pool, taken = POOLS[name]
    between = [nn.BatchNorm2d(8)] if norm else []
    steps = {"relu": [nn.ReLU()], "pool": [pool, First()]}
    after = [layer for step in order.split() for layer in steps[step]]
    stock, fused = twins(nn.Conv2d(3, 8, 3, padding=1), *between, *after, full=full)
    check(stock, fused, x := images((2, 3, 17, 14)), tolerance=2e-5)
    whole = " ".join(["conv", *(["norm"] if norm else []), *sorted(order.split(), reverse=True)])
    assert (fused_chains(fused, x) == [whole]) == taken
