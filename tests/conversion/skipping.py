"""What tests of skip steps share."""

from __future__ import annotations

import torch
from torch import nn

import wus_ext


class Net(nn.Module):
    """Every kind of parameter: drop-in layers, stock layers, raw ones, a module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.shift_bias = nn.Parameter(torch.randn(6))
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.twice = nn.Conv2d(6, 6, 1)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.act = nn.PReLU()
        self.head = nn.Linear(6, 4)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.twice(self.act(self.twice(self.norm(self.conv(x))))))

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        x = self.features(x).mean((2, 3)) * self.scale + self.shift_bias
        return self.head(gain * x)


BIASES = {"shift_bias", "conv.bias", "norm.bias", "twice.bias", "up.bias", "head.bias"}


def images(*size: int) -> torch.Tensor:
    return torch.randn(*(size or (2, 3, 6, 6)))


def net(**options) -> Net:
    return wus_ext.convert(Net(), **options)


def with_gradient(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def backward(model: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    output = model(images() if x is None else x)
    output.backward(torch.randn_like(output))
    return output.detach()


# --- convert and revert ---------------------------------------------------------------------
