"""What tests of the user's own forward share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wus_ext

from .chains import frozen, relative_error

MODES = ("skip", "fused")


class Net(nn.Module):
    """Two convolutions; what a test adds comes in between."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.between(self.activation(self.norm(self.first(x))))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))

    def activation(self, x):
        return torch.relu(x)

    def between(self, x):
        return x


def twins(cls, mode, *args):
    """The stock model as the step has it, and the converted one."""
    torch.manual_seed(0)
    stock = cls(*args).to(memory_format=torch.channels_last)
    converted = copy.deepcopy(stock)
    if mode == "skip":
        wus_ext.set_skip(wus_ext.convert(converted), True)
        frozen(stock)
    else:
        wus_ext.convert(converted, full="fused")
    return stock, converted


def agree(stock, converted, x, tolerance=2e-5):
    """Outputs, gradients and buffers; x goes through both, in this order."""
    results = []
    for model in (stock, converted):
        model.zero_grad()
        torch.manual_seed(1)
        inner = x.clone().requires_grad_()
        output = model(inner)
        output.backward(torch.ones_like(output) * torch.linspace(-1, 1, output.shape[-1]))
        results.append((output, inner.grad, model))
    (expected, wanted, _), (actual, got, _) = results
    assert type(actual) is type(expected)
    assert relative_error(actual, expected) < tolerance
    assert relative_error(got, wanted) < tolerance
    assert got.stride() == wanted.stride()
    for (name, mine), theirs in zip(converted.named_parameters(), stock.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            error = (mine.grad - theirs.grad).norm()
            assert error <= 5 * tolerance * theirs.grad.norm() + 2e-5, name
    for (name, mine), theirs in zip(converted.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)


mode = pytest.mark.parametrize("mode", MODES)
