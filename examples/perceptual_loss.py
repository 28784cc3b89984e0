"""Perceptual loss: a small network learns to enlarge photographs (arXiv 1603.08155).

    python examples/perceptual_loss.py [--stock] [--out enlarged.png]

What it makes and the original must look alike to a network whose weights stand still: VGG-16's
first layers, here with random weights, or with those of --weights.
"""

import time

import torch
import torchvision
from options import options
from real_images import patches
from torch import nn
from torch.nn.functional import interpolate, l1_loss, mse_loss

import wus_ext


def enlarger() -> nn.Module:
    """Twice as large: the residual to bilinear interpolation."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 12, 3, padding=1), nn.PixelShuffle(2)),
    ).to(memory_format=torch.channels_last)


def judge(stock: bool, weights: str | None) -> nn.Module:
    """Gives the features that are compared."""
    vgg = torchvision.models.vgg16()
    if weights:
        vgg.load_state_dict(torch.load(weights, weights_only=True))
    network = vgg.features[:16].to(memory_format=torch.channels_last)
    if stock:
        return network.requires_grad_(False)
    wus_ext.convert(network)
    wus_ext.set_skip(network, True, skip_biases=True)
    return network


def prepare(stock: bool, size: int = 64, batch: int = 16, weights: str | None = None):
    """The network, the photographs, and one step of training, which returns the loss."""
    torch.manual_seed(0)
    network, perceive = enlarger(), judge(stock, weights)
    photos = patches(size, 256)
    small = interpolate(photos, scale_factor=0.5, mode="bilinear", antialias=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def step() -> float:
        chosen = torch.randint(0, len(photos), (batch,))
        wanted = photos[chosen]
        optimizer.zero_grad()
        made = interpolate(small[chosen], scale_factor=2, mode="bilinear") + network(small[chosen])
        with torch.no_grad():
            seen = perceive(wanted)
        loss = l1_loss(made, wanted) + mse_loss(perceive(made), seen) / seen.square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return network, small, step


def main(arguments=None) -> None:
    given = options(__doc__, arguments, steps=80, stock=False, weights=None, out="enlarged.png")

    network, small, step = prepare(given.stock, weights=given.weights)
    start, losses = time.perf_counter(), [step() for _ in range(given.steps)]
    seconds = time.perf_counter() - start
    with torch.no_grad():
        before = interpolate(small[:8], scale_factor=2, mode="bilinear")
        after = (before + network(small[:8])).clamp(0, 1)
    torchvision.utils.save_image(torch.cat([before, after]), given.out)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {seconds:.1f} s: {given.out}")


if __name__ == "__main__":
    main()
