"""Style transfer: a temple painted like a flower (Gatys et al., arXiv 1508.06576).

    python examples/style_transfer.py [--stock] [--weights vgg.pt] [--out picture.png]

The picture is what trains; the network only passes gradients on. Random features carry style, too
(Ustyuzhaninov et al., arXiv 1606.00021), so that no weights need be downloaded.
"""

import time

import torch
import torchvision
from options import options
from real_images import photo
from torch import nn
from torch.nn.functional import mse_loss

import wus_ext

STYLE, CONTENT = (1, 6, 11, 16), (11,)  # outputs of ReLUs


class Features(nn.Sequential):
    """Gives the outputs of the layers that are compared."""

    def forward(self, image):
        kept = {}
        for index, layer in enumerate(self):
            image = layer(image)
            if index in STYLE + CONTENT:
                kept[index] = image
        return kept


def gram(x):
    flat = x.flatten(2)
    return flat @ flat.mT / flat.shape[-1]


def prepare(stock: bool, size: int = 160, weights: str | None = None):
    """The picture, and a function that improves it by one step and returns the loss."""
    torch.manual_seed(0)
    vgg = torchvision.models.vgg11()
    if weights:
        vgg.load_state_dict(torch.load(weights, weights_only=True))
    network = Features(*vgg.features[:17]).to(memory_format=torch.channels_last)
    if stock:
        network.requires_grad_(False)
    else:
        wus_ext.convert(network)
        wus_ext.set_skip(network, True, skip_biases=True)
    content, style = photo("china", size), photo("flower", size)
    with torch.no_grad():
        wanted = network(content)
        styles = {index: gram(x) for index, x in network(style).items()}
    picture = content.clone().requires_grad_()
    optimizer = torch.optim.Adam([picture], lr=0.02)

    def step() -> float:
        optimizer.zero_grad()
        found = network(picture)
        loss = sum(mse_loss(found[i], wanted[i]) for i in CONTENT)
        for i in STYLE:
            loss = loss + mse_loss(gram(found[i]), styles[i]) / styles[i].square().mean()
        loss.backward()
        optimizer.step()
        picture.data.clamp_(0, 1)
        return loss.item()

    return picture, step


def main(arguments=None) -> None:
    given = options(
        __doc__, arguments, steps=60, size=160, stock=False, weights=None, out="style.png"
    )

    picture, step = prepare(given.stock, given.size, given.weights)
    start, losses = time.perf_counter(), [step() for _ in range(given.steps)]
    torchvision.utils.save_image(picture.detach(), given.out)
    seconds = time.perf_counter() - start
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {seconds:.1f} s: {given.out}")


if __name__ == "__main__":
    main()
