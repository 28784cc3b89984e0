"""Steps of the examples against stock PyTorch: the figures of docs/recipes.md.

    python benchmarks/recipes.py                      # all of them
    python benchmarks/recipes.py gan style_transfer --rounds 40

Stock is the same script with --stock: what stands still has no requires_grad, where one can say so
beforehand. The variants take turns, a step each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import freeze, machine, median_ms, table
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).parent.parent / "examples"))

import adversarial_training
import gan
import perceptual_loss
import style_transfer
import transfer_learning
import unet
from network import network
from real_images import digits

import wus_ext
from wus_ext.profiling.timing import interleaved, spread

Step = Callable[[], object]


def frozen_encoder(stock: bool) -> Step:
    """The U-Net's second phase."""
    model, step = unet.prepare(stock)
    step()
    unet.freeze(model, stock)
    return step


def transfer(stock: bool) -> Step:
    """Biases and the last layer of the small network train, batch 64."""
    torch.manual_seed(0)
    model = network(5)
    if stock:
        freeze(model).get_submodule(transfer_learning.LAST).requires_grad_(True)
    else:
        wus_ext.convert(model)
        wus_ext.set_skip(model, True)
        wus_ext.set_skip(model, False, layers=transfer_learning.LAST)
    images, labels = (tensor[:64] for tensor in digits())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), labels % 5).backward()
        optimizer.step()

    return step


STEPS: dict[str, Callable[[bool], Step]] = {
    "transfer_learning": transfer,
    "style_transfer": lambda stock: style_transfer.prepare(stock)[1],
    "perceptual_loss": lambda stock: perceptual_loss.prepare(stock)[2],
    "adversarial_training": lambda stock: adversarial_training.prepare(stock)[1],
    "unet": frozen_encoder,
    "gan": lambda stock: gan.prepare(stock)[1],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(STEPS))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if unknown := set(args.recipes) - STEPS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")

    rows = []
    for name in args.recipes or STEPS:
        variants = {kind: STEPS[name](kind == "stock") for kind in ("stock", "wus_ext")}
        seconds = interleaved(variants, args.rounds)
        stock, mine = (median_ms(seconds[kind]) for kind in variants)
        spreads = " and ".join(f"{100 * spread(seconds[kind]):.0f} %" for kind in variants)
        ratio = f"**{mine / stock:.2f}**"
        rows.append([f"`{name}.py`", f"{stock:.0f} ms", f"{mine:.0f} ms", ratio, spreads])
    print(machine())
    print()
    print(table(["example", "stock", "wus_ext", "of stock", "spread"], rows))


if __name__ == "__main__":
    main()
