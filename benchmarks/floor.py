"""How far a skip step on the CPU is from its floor: its matrix products at the machine's own rate.

    python benchmarks/floor.py                       # the networks, batch 64
    python benchmarks/floor.py --models vgg16 --batch-size 128

The products are those of the schemes that the skip step chooses (Winograd, polyphase, linear
layers); the first layer has no data gradient. Transforms, batch norm, masks and SGD come on top.
The rate is that of torch.mm on 2048x2048 matrices, in turns with the skip steps.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from common import NETWORKS, TrainingStep, batch, machine, table
from torch import nn

import wus_ext
from wus_ext.engine.conv.geometry import Geometry, Scheme, schemes, suits_strided
from wus_ext.profiling.timing import interleaved

SIDE = 2048
#: Products of a tile, and the tile's outputs along a side.
TILES = {Scheme.F4: (36, 4), Scheme.F2: (16, 2), Scheme.Z2: (9, 2)}
POLYPHASE = (36, 3)


def flops(layer: nn.Module, input: torch.Tensor) -> tuple[int, int]:
    """Of one product of a layer, for the whole batch: by definition, and by the chosen scheme."""
    once = 2 * len(input) * layer.weight.numel()
    if isinstance(layer, nn.Linear):
        return once, once
    geometry = Geometry.of(layer, layer.weight.shape, input.shape)
    height, width = geometry.output_size
    direct = once * height * width
    if chosen := schemes(geometry, "auto"):
        products, side = TILES[chosen[0]]
    elif layer.kernel_size == (3, 3) and suits_strided(geometry, "auto"):
        products, side = POLYPHASE
    else:
        return direct, direct
    tiles = math.ceil(height / side) * math.ceil(width / side)
    return direct, once // 9 * products * tiles


def products(model: nn.Module, images: torch.Tensor) -> tuple[int, int]:
    """Floating-point operations of a skip step's products: by definition, by the schemes."""
    counts: list[tuple[int, int]] = []

    def count(layer, inputs, _):
        passes = 2 if counts else 1
        counts.append(tuple(passes * n for n in flops(layer, inputs[0])))

    hooks = [
        layer.register_forward_hook(count)
        for layer in model.modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    direct, chosen = zip(*counts, strict=True)
    return sum(direct), sum(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    images, labels = batch(args.batch_size, "cpu")
    images = images.contiguous(memory_format=torch.channels_last)
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    lines = []
    for name in args.models:
        torch.manual_seed(0)
        model = wus_ext.revert(NETWORKS[name]()).to(memory_format=torch.channels_last)
        direct, chosen = products(model, images)
        wus_ext.set_skip(wus_ext.convert(model), True)
        seconds = interleaved(
            {"skip": TrainingStep(model, images, labels), "mm": lambda: left @ right}, args.rounds
        )
        rate = 2 * SIDE**3 / statistics.median(seconds["mm"])
        step = statistics.median(seconds["skip"])
        lines.append(
            [
                name,
                f"{direct / 1e9:.1f}",
                f"{chosen / 1e9:.1f}",
                f"{rate / 1e9:.0f}",
                f"{1e3 * chosen / rate:.0f}",
                f"{1e3 * step:.0f}",
                f"{chosen / rate / step:.2f}",
            ]
        )
    header = [
        "network",
        "products, GFLOP",
        "by the schemes, GFLOP",
        "torch.mm, GFLOP/s",
        "floor, ms",
        "skip, ms",
        "floor / skip",
    ]
    print(f"{machine()}; batch {args.batch_size}, {args.rounds} rounds\n")
    print(table(header, lines))


if __name__ == "__main__":
    main()
