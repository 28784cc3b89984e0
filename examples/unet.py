"""A U-Net that removes noise from photographs; its encoder stands still after a while.

    python examples/unet.py [--stock]

Fine-tuning a decoder on a frozen encoder: the encoder's layers skip, biases included, so no
backward pass goes through them and nothing of them is saved.
"""

import time

import torch
from options import options
from real_images import patches
from torch import nn
from torch.nn.functional import interpolate, max_pool2d, mse_loss

import wus_ext


def block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()),
        *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()),
    )


class UNet(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.encoder = nn.ModuleList(map(block, [3, *widths], widths))
        self.decoder = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, noisy):
        kept, x = [], noisy
        for part in self.encoder:
            x = part(x if not kept else max_pool2d(x, 2))
            kept.append(x)
        kept.pop()
        for part in self.decoder:
            x = part(torch.cat([interpolate(x, scale_factor=2.0), kept.pop()], 1))
        return noisy - self.last(x)


def freeze(model: UNet, stock: bool) -> None:
    if stock:
        model.encoder.requires_grad_(False)
    else:
        wus_ext.set_skip(model, True, layers="encoder", skip_biases=True)


def prepare(stock: bool, size: int = 64, batch: int = 8):
    """The network, and one step of training, which returns the loss."""
    torch.manual_seed(0)
    model = UNet().to(memory_format=torch.channels_last)
    if not stock:
        wus_ext.convert(model, full="fused")
    photos = patches(size, 256)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> float:
        wanted = photos[torch.randint(0, len(photos), (batch,))]
        loss = mse_loss(model(wanted + 0.2 * torch.randn_like(wanted)), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step


def main(arguments=None) -> None:
    given = options(__doc__, arguments, steps=40, stock=False)

    model, step = prepare(given.stock)
    for phase in ("everything trains", "the decoder trains"):
        if phase == "the decoder trains":
            freeze(model, given.stock)
        start, losses = time.perf_counter(), [step() for _ in range(given.steps)]
        seconds = time.perf_counter() - start
        print(f"{phase}: error {losses[0]:.4f} -> {losses[-1]:.4f} in {seconds:.1f} s")


if __name__ == "__main__":
    main()
