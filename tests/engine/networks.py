"""Small networks at random, as hypothesis draws and shrinks them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

#: Activations: modules, functions, methods and what works in place.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": nn.ReLU(),
    "ReLU in place": nn.ReLU(inplace=True),
    "relu": torch.relu,
    "relu_": Tensor.relu_,
    "ReLU6": nn.ReLU6(),
    "LeakyReLU": nn.LeakyReLU(0.1),
    "leaky_relu, -0.3": lambda x: F.leaky_relu(x, -0.3),
    "hardsigmoid": F.hardsigmoid,
    "Hardswish in place": nn.Hardswish(inplace=True),
    "SiLU": nn.SiLU(),
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "clamp": lambda x: x.clamp(-1, 1),
}

#: Squeeze-and-excitation: what is squeezed, and the product with its gate.
GATES: dict[str, Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "pool": lambda x, gate: gate(F.adaptive_avg_pool2d(x, 1)) * x,
    "mean": lambda x, gate: x * gate(x.mean((2, 3), keepdim=True)),
}

#: Where an activation's slope jumps.
KINKS = {
    "ReLU": (0,), "ReLU in place": (0,), "relu": (0,), "relu_": (0,), "ReLU6": (0, 6),
    "LeakyReLU": (0,), "leaky_relu, -0.3": (0,), "hardsigmoid": (-3, 3),
    "Hardswish in place": (-3, 3), "clamp": (-1, 1),
}  # fmt: skip


class GroupNorm(nn.GroupNorm):
    """Always with a gradient to hand back: else stock's crashes on channels_last (torch 2.11)."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not input.requires_grad:
            input = input.detach().requires_grad_()
        return super().forward(input)


NORMS = {
    "batch": nn.BatchNorm2d,
    "batch, not affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "batch, not tracked": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "group": lambda channels: GroupNorm(math.gcd(channels, 4), channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
}


@dataclass(frozen=True)
class Pool:
    kind: str  # max or avg
    kernel: int
    stride: int
    padding: int
    ceil: bool


@dataclass(frozen=True)
class Block:
    """[norm +] conv [+ norm] [+ residual] [+ activation] [+ gate] [+ pool] [+ dropout]."""

    channels: int
    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]
    dilation: int
    groups: int
    bias: bool
    first_norm: str | None
    norm: str | None
    residual: str | None
    activation: str | None
    gate: str | None
    pool: Pool | None
    dropout: float


@dataclass(frozen=True)
class Dense:
    """linear [+ activation] [+ dropout]."""

    features: int
    bias: bool
    activation: str | None
    dropout: float


@dataclass(frozen=True)
class Network:
    input: tuple[int, int, int, int]
    blocks: tuple[Block, ...]
    layers: tuple[Dense, ...]


def either(*values):
    return st.sampled_from(values)


def optional(strategy):
    return st.none() | strategy


@st.composite
def blocks(draw, inputs: int) -> Block:
    kernel = draw(either((3, 3), (3, 3), (1, 1), (5, 5), (1, 3)))
    channels = draw(either(16, 8, 24, 12, 32))
    groups = draw(either(1, 1, 4, inputs))
    if groups == inputs:
        channels = inputs
    pool = st.builds(Pool, either("max", "max", "avg"), either(2, 3), either(2, 1, 3), either(0, 1),
                     st.booleans())  # fmt: skip
    return Block(
        channels,
        kernel,
        draw(either(1, 1, 2)),
        draw(either(tuple(k // 2 for k in kernel), (0, 0), tuple(k - 1 for k in kernel))),
        draw(either(1, 1, 1, 2)),
        groups if inputs % groups == 0 and channels % groups == 0 else 1,
        draw(st.booleans()),
        draw(either(None, None, *NORMS)),
        draw(optional(either(*NORMS))),
        draw(either(None, None, "x + y", "y + x", "y += x")),
        draw(optional(either(*ACTIVATIONS))),
        draw(either(None, None, None, *GATES)),
        draw(optional(pool)),
        draw(either(0.0, 0.0, 0.3)),
    )


@st.composite
def networks(draw) -> Network:
    channels = draw(either(16, 3, 8, 20))
    size = draw(either(8, 12, 9, 2, 14)), draw(either(8, 10, 7, 2, 13))
    input = draw(either(2, 3, 1)), channels, *size
    chain = []
    for _ in range(draw(st.integers(1, 4))):
        chain.append(draw(blocks(channels)))
        channels = chain[-1].channels
    activation = optional(either(*ACTIVATIONS))
    dense = st.builds(Dense, either(16, 5, 40), st.booleans(), activation, either(0.0, 0.4))
    return Network(input, tuple(chain), tuple(draw(st.lists(dense, max_size=2))))


class Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.kinks = KINKS.get(name, ())

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)


def through(x: Tensor, *parts: nn.Module | None) -> Tensor:
    """Those that there are, one after the other."""
    for part in parts:
        if part is not None:
            x = part(x)
    return x


class ConvBlock(nn.Module):
    """A block, or as much of it as the size of its input allows."""

    def __init__(self, block: Block, x: Tensor) -> None:
        super().__init__()
        padding, dilation = list(block.padding), block.dilation
        for i in range(2):
            padding[i] = max(
                padding[i], -(-(dilation * (block.kernel[i] - 1) + 1 - x.size(i + 2)) // 2)
            )
        self.first_norm = None
        if block.first_norm and x.numel() // x.size(1) >= 8:
            maps = x.size(2) * x.size(3)
            if block.first_norm != "instance" or maps >= 8:
                self.first_norm = NORMS[block.first_norm](x.size(1))
        self.first_activation = Activation("ReLU") if self.first_norm is not None else None
        self.conv = nn.Conv2d(x.size(1), block.channels, block.kernel, block.stride,
                              tuple(padding), dilation, block.groups, block.bias)  # fmt: skip
        y = self.conv(x)
        values = y.numel() // y.size(1)
        self.norm = NORMS[block.norm](y.size(1)) if block.norm and values >= 8 else None
        if block.norm == "instance" and y.size(2) * y.size(3) < 8:
            self.norm = None
        self.residual = block.residual
        self.shortcut = None
        if block.residual and y.shape != x.shape:
            self.shortcut = nn.Conv2d(x.size(1), y.size(1), 1, bias=False)
        self.activation = Activation(block.activation) if block.activation else None
        self.gate = block.gate
        if block.gate:
            self.excite = nn.Conv2d(y.size(1), y.size(1), 1)
        self.pool = None
        if block.pool and min(y.shape[2:]) + 2 * block.pool.padding >= block.pool.kernel:
            kind = nn.MaxPool2d if block.pool.kind == "max" else nn.AvgPool2d
            p = block.pool
            self.pool = kind(p.kernel, p.stride, p.padding, ceil_mode=p.ceil)
        self.dropout = nn.Dropout(block.dropout) if block.dropout else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(through(x, self.first_norm, self.first_activation))
        x = x if self.residual else None
        if self.norm is not None:
            y = self.norm(y)
        if self.residual:
            if self.shortcut is not None:
                x = F.adaptive_avg_pool2d(self.shortcut(x), y.shape[2:])
            if self.residual == "y += x":
                y += x
            else:
                y = x + y if self.residual == "x + y" else y + x
        y = through(y, self.activation)
        if self.gate:
            y = GATES[self.gate](y, lambda squeezed: torch.sigmoid(self.excite(squeezed)))
        return through(y, self.pool, self.dropout)


class DenseBlock(nn.Module):
    def __init__(self, dense: Dense, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, dense.features, dense.bias)
        self.activation = Activation(dense.activation) if dense.activation else None
        self.dropout = nn.Dropout(dense.dropout) if dense.dropout else None

    def forward(self, x: Tensor) -> Tensor:
        return through(self.linear(x), self.activation, self.dropout)


def build(network: Network) -> nn.Sequential:
    """The network, with scales and shifts away from one and zero."""
    model = nn.Sequential()
    x = torch.zeros(network.input)
    with torch.no_grad():
        for block in network.blocks:
            model.append(ConvBlock(block, x))
            x = model[-1](x)
        if network.layers:
            model.append(nn.Flatten())
        for dense in network.layers:
            model.append(DenseBlock(dense, x[0].numel()))
            x = model[-1](x.flatten(1))
    for module in model.modules():
        if hasattr(module, "reset_running_stats"):
            module.reset_running_stats()
        norm = isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d)
        if norm and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model
