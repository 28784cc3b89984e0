"""A GAN that writes digits: the discriminator stands still in the generator's step.

    python examples/gan.py [--stock] [--out digits.png]

The generator's gradient goes through the discriminator, whose own gradients are of no use there.
Stock computes them all the same, or takes requires_grad_(False) and True in turn.
"""

import contextlib
import time

import torch
import torchvision
from options import options
from real_images import digits
from torch import nn
from torch.nn.functional import softplus

import wus_ext


def generator(width: int = 32) -> nn.Module:
    def larger(inputs: int, outputs: int):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return nn.Upsample(scale_factor=2), convolution, nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(
        *(nn.Linear(32, 64 * width), nn.ReLU(), nn.Unflatten(1, (4 * width, 4, 4))),
        *(*larger(4 * width, 2 * width), *larger(2 * width, width)),
        *(nn.Conv2d(width, 1, 3, padding=1), nn.Tanh()),
    ).to(memory_format=torch.channels_last)


def discriminator(width: int = 64) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.4), nn.Linear(4 * width * 16, 1)),
    ).to(memory_format=torch.channels_last)


def prepare(stock: bool, batch: int = 64):
    """The generator, and a step of both, which returns their losses."""
    torch.manual_seed(0)
    make, judge = generator(), discriminator()
    frozen = contextlib.nullcontext
    if not stock:
        wus_ext.convert(judge, full="fused")
        wus_ext.convert(make, full="fused")

        def frozen():
            return wus_ext.skip_weight_updates(judge, skip_biases=True)

    real, _ = digits(size=16, channels=1)
    makes, judges = (torch.optim.Adam(m.parameters(), 1e-3, (0.5, 0.99)) for m in (make, judge))

    def step() -> tuple[float, float]:
        made = make(torch.randn(batch, 32))
        judges.zero_grad()
        seen = real[torch.randint(0, len(real), (batch,))]
        judged = softplus(-judge(seen)).mean() + softplus(judge(made.detach())).mean()
        judged.backward()
        judges.step()
        makes.zero_grad()
        with frozen():
            fooled = softplus(-judge(made)).mean()
            fooled.backward()
        makes.step()
        return judged.item(), fooled.item()

    return make, step


def main(arguments=None) -> None:
    given = options(__doc__, arguments, steps=300, stock=False, out="digits.png")

    make, step = prepare(given.stock)
    start = time.perf_counter()
    for number in range(1, given.steps + 1):
        judged, fooled = step()
        if number == given.steps or number % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"step {number}: judge {judged:.2f}, maker {fooled:.2f}, {seconds:.1f} s")
    with torch.no_grad():
        torchvision.utils.save_image(make(torch.randn(64, 32)) / 2 + 0.5, given.out)


if __name__ == "__main__":
    main()
