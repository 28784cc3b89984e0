"""What a forward pass costs besides its arithmetic: small models, one thread, microseconds.

    python benchmarks/host.py

The networks are so small that the time is the host's: modules, deferral, chains, autograd. Stock is
timed in the same run, interleaved; medians.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from common import machine, table
from torch import Tensor, nn

import wus_ext

ROUNDS, CALLS = 15, 20


class Block(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Identity()
        if stride > 1:
            self.down = nn.Sequential(
                nn.Conv2d(channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        return self.relu(out)


def resnet(channels: int = 16) -> nn.Module:
    """ResNet-18's layers, thin."""
    stem = nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(True)
    blocks = (Block(channels, stride) for stride in (1, 1, 2, 1, 2, 1, 2, 1))
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    )


def plain() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def calls(model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """Forward passes of copies of a model."""
    made = {
        "stock": copy.deepcopy(model),
        "full, converted": wus_ext.convert(copy.deepcopy(model)),
        "skip": wus_ext.convert(copy.deepcopy(model)),
        "skip, layer by layer": wus_ext.convert(copy.deepcopy(model), fuse=False),
        'full="fused"': wus_ext.convert(copy.deepcopy(model), full="fused"),
    }
    for name in ("skip", "skip, layer by layer"):
        wus_ext.set_skip(made[name], True)
    return {name: lambda own=own: own(x) for name, own in made.items()}


def microseconds(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            times[name].append((time.perf_counter() - start) / CALLS)
    return {name: 1e6 * median(own[1:]) for name, own in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    print(machine(), end="\n\n")
    rows = []
    for build, x in ((resnet, torch.randn(2, 3, 8, 8)), (plain, torch.randn(1, 3, 8, 8))):
        model = build().to(memory_format=torch.channels_last)
        timed = microseconds(calls(model, x.to(memory_format=torch.channels_last)))
        rows.append([build.__name__, *(f"{value:.0f}" for value in timed.values())])
    print(table(["forward pass, us", *timed], rows))


if __name__ == "__main__":
    main()
