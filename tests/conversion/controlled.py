"""What tests of chosen layers share."""

from __future__ import annotations

import copy

import torch
from torch import nn

import wus_ext
from tests.conversion.skipping import BIASES, Net
from tests.engine.chains import (
    stock_chain,
)

EVERYTHING = {name for name, _ in Net().named_parameters()}
WEIGHTS = EVERYTHING - BIASES


def pair(name: str, channels_last: bool = True, **settings: object) -> tuple[nn.Module, nn.Module]:
    """A stock model and a converted one of the same values."""
    stock = stock_chain(name, channels_last)
    return stock, wus_ext.convert(copy.deepcopy(stock), **settings)


def owners(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(False))
    ]


def freeze(stock: nn.Module, layers: list[str], biases: bool = False) -> None:
    """Stock's own way to the same step."""
    for name, parameter in stock.named_parameters():
        inside = name.rpartition(".")[0] in layers
        is_bias = name.endswith("bias")
        parameter.requires_grad_(not inside or (is_bias and not biases))


# --- which layers ---------------------------------------------------------------------------


class Parts(nn.Module):
    """Names inside names, one module under two names, weights of children, raw lists."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.alias = self.body[0]
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scales = nn.ParameterList([torch.rand(8) + 0.5])
        self.shared = nn.Linear(8, 8)
        self.shared.weight = self.body[1][0].weight

    def forward(self, x):
        x = self.attention(*3 * [self.body(x)], need_weights=False)[0]
        return self.shared(self.alias(x) * self.scales[0])
