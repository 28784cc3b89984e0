"""The table of chains, and what compares a converted model with the stock one."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wus_ext
from wus_ext.profiling.saved import saving


def conv(*args, **kwargs):
    return nn.Conv2d(*args, **kwargs)


def untracked(norm):
    """Statistics that are kept but not tracked any more."""
    norm.track_running_stats = False
    return norm


def sequence(*layers):
    return lambda: nn.Sequential(*(copy.deepcopy(layer) for layer in layers))


class Functional(nn.Module):
    """The same chains through functions and methods, with a residual."""

    def __init__(self, channels=8, in_place=False):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.third = nn.Conv2d(channels, channels, 3, padding=1)
        self.in_place = in_place

    def forward(self, x):
        x = F.relu(self.first(x))
        y = self.norm(self.second(x))
        if self.in_place:
            y += x
        else:
            y = x + y
        y = y.relu()
        return F.max_pool2d(torch.relu_(self.third(y)), 2)


class Block(nn.Module):
    """Two branches that both end in a norm: one takes the sum, the other stays a chain."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.down = nn.Sequential(nn.Conv2d(channels, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.down(x))


class Dense(nn.Module):
    """A dense block's layer: norm and activation come first, on what was concatenated."""

    def __init__(self, channels=8):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 16, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 8, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x), inplace=True))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def gradient_functions(output):
    """The names of all functions that a backward pass of a tensor goes through."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return [node.name() for node in seen]


CHANNELS = 16

CHAINS = {
    "conv": sequence(conv(3, 8, 3, padding=1), conv(8, CHANNELS, 3, padding=1)),
    "conv_relu": sequence(
        conv(3, 8, 3, padding=1), nn.ReLU(), conv(8, CHANNELS, 3, padding=1), nn.ReLU()
    ),
    "conv_relu_pool": sequence(
        conv(3, 8, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2),
        conv(8, CHANNELS, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 2),
    ),
    "conv_norm": sequence(
        conv(3, 8, 3, padding=1), conv(8, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
    ),
    "conv_norm_relu": sequence(
        conv(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        conv(8, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU(),
    ),
    "conv_norm_relu_pool": sequence(
        conv(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        conv(8, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.MaxPool2d(2),
    ),
    "norm_options": sequence(
        conv(3, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False), nn.ReLU(),
        conv(8, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(),
        conv(8, 8, 3, padding=1), untracked(nn.BatchNorm2d(8)), nn.ReLU(),
        conv(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None, eps=1e-2),
    ),
    "other_geometries": sequence(
        conv(3, 8, 3, padding=1), nn.ReLU(), conv(8, 8, 3, stride=2), nn.ReLU(),
        conv(8, 8, 1), nn.ReLU(), conv(8, 8, 3, padding=2, dilation=2), nn.ReLU(),
        conv(8, 8, 3, padding=1, groups=4), nn.ReLU(), conv(8, 8, (1, 3), padding=(0, 1)),
    ),
    "paddings": sequence(
        conv(3, 8, 3, padding=2), nn.ReLU(), conv(8, 8, 3), nn.ReLU(),
        conv(8, 8, 3, padding=2), nn.ReLU(), conv(8, 8, 3, padding="same"), nn.ReLU(),
        conv(8, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
    ),
    "odd_channels": sequence(
        conv(3, 13, 3, padding=1), nn.ReLU(), conv(13, 9, 3, padding=1), nn.BatchNorm2d(9),
        nn.ReLU(), conv(9, 1, 3, padding=1), nn.ReLU(),
    ),
    "functional": Functional,
    "in_place_sum": lambda: Functional(in_place=True),
    "block": lambda: nn.Sequential(conv(3, 8, 3, padding=1), nn.ReLU(), Block()),
    "norm_first": sequence(
        conv(3, 8, 3, padding=1, bias=False), Dense(8), Dense(16), nn.BatchNorm2d(24), nn.ReLU(),
        nn.MaxPool2d(2),
    ),
    "norm_of_others": sequence(
        nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 8, 2, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AvgPool2d(2), nn.BatchNorm2d(8, affine=False), conv(8, 8, 3), nn.ReLU(),
    ),
    "linear": sequence(
        conv(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(True), nn.Linear(512, 3),
    ),
    "dropout": sequence(
        conv(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(16, 24), nn.ReLU(), nn.Dropout(0.4), nn.Linear(24, 3),
    ),
}  # fmt: skip

chain = pytest.mark.parametrize("name", CHAINS)


def frozen(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def stock_chain(name, channels_last=True):
    """A stock model of the table, its scales and shifts away from one and zero."""
    torch.manual_seed(0)
    stock = CHAINS[name]()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return stock.to(memory_format=torch.channels_last) if channels_last else stock


def build(name, *, channels_last=True, **settings):
    """A stock model frozen stock's way, and its converted twin in a skip window."""
    stock = stock_chain(name, channels_last)
    skip = wus_ext.convert(copy.deepcopy(stock), **settings)
    wus_ext.set_skip(skip, True)
    return frozen(stock), skip


def images(size=(2, 3, 12, 10), channels_last=True):
    x = torch.randn(size)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def run(model, x, grad_output=None, seed=1):
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    output = model(x)
    if grad_output is None:
        grad_output = torch.randn_like(output)
    output.backward(grad_output)
    return output.detach(), x.grad, grad_output


def strides(tensor):
    """Those that mean something."""
    return tuple(s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)


def relative_error(actual, expected):
    """Of all values together; a gradient may differ where rounding flips one ReLU."""
    scale = expected.double().norm().clamp(min=1e-3)
    return ((actual.double() - expected.double()).norm() / scale).item()


def check(stock, skip, x, tolerance):
    """Outputs, gradients and buffers agree.

    A value within rounding of zero may pass one ReLU and not the other; it is about one input in
    ten that has one. So one input of three has to agree, which no systematic error survives.
    """
    for _ in range(3):
        error = worst_error(stock, skip, x)
        if error < tolerance:
            return
        x = torch.randn_like(x)
    raise AssertionError(f"relative error {error:.1e}, at most {tolerance:.1e} wanted")


def worst_error(stock, skip, x):
    stock.zero_grad()
    skip.zero_grad()
    expected, wanted, grad_output = run(stock, x)
    actual, got, _ = run(skip, x, grad_output)
    assert actual.shape == expected.shape
    errors = [relative_error(actual, expected), relative_error(got, wanted)]
    # A bias in front of batch statistics has a gradient of zero; stock's is the rounding of others.
    scale = 1 + max(p.grad.norm().item() for p in stock.parameters() if p.grad is not None)
    biases = 0
    for (name, mine), (_, theirs) in zip(
        skip.named_parameters(), stock.named_parameters(), strict=True
    ):
        if theirs.grad is None:
            assert mine.grad is None, name
        else:
            biases += 1
            errors.append((mine.grad - theirs.grad).norm().item() / scale)
    assert biases
    for (name, mine), (_, theirs) in zip(skip.named_buffers(), stock.named_buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)
    return max(errors)


@contextmanager
def recorded(model):
    """The chains that run inside, each as the names of its steps."""
    chains = []
    with model._skip_engine.recording() as record:
        yield chains
        chains += [steps for _, steps in record]


def fused_chains(model, *args):
    """The chains of one forward pass."""
    with recorded(model) as chains:
        model(*args)
    return chains


def saved_bytes(model, x):
    with saving([*model.parameters(), *model.buffers(), x]) as saved:
        output = model(x)
    return saved(), output
