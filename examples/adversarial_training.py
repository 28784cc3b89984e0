"""Adversarial training with PGD (Madry et al., arXiv 1706.06083) on handwritten digits.

    python examples/adversarial_training.py [--stock]

The attack needs the gradient of the images alone, so it runs in skip steps in which biases stand
still, too; the step that trains is a full one on the fused kernels.
"""

import contextlib
import time

import torch
from network import network
from options import options
from real_images import digits
from torch.nn.functional import cross_entropy

import wus_ext

EPSILON, MOVE = 0.15, 0.05  # of images in [-1, 1]


def attack(model, images, labels, steps: int, skip):
    """Images at most EPSILON away that raise the loss."""
    moved = images
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        with skip():
            loss = cross_entropy(model(moved), labels)
            (gradient,) = torch.autograd.grad(loss, moved)
        moved = images + (moved + MOVE * gradient.sign() - images).clamp(-EPSILON, EPSILON)
        moved = moved.clamp(-1, 1)
    return moved.detach()


def prepare(stock: bool, batch: int = 32, attack_steps: int = 5):
    """The network, and one step of training, which returns the loss of what the attack found."""
    torch.manual_seed(0)
    model = network()
    skip = contextlib.nullcontext
    if not stock:
        wus_ext.convert(model, full="fused")

        def skip():
            return wus_ext.skip_weight_updates(model, skip_biases=True)

    images, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> float:
        chosen = torch.randint(0, len(images), (batch,))
        found = attack(model, images[chosen], labels[chosen], attack_steps, skip)
        optimizer.zero_grad()
        loss = cross_entropy(model(found), labels[chosen])
        loss.backward()
        optimizer.step()
        return loss.item()

    return model, step


def main(arguments=None) -> None:
    given = options(__doc__, arguments, steps=80, stock=False)

    model, step = prepare(given.stock)
    start, losses = time.perf_counter(), [step() for _ in range(given.steps)]
    seconds = time.perf_counter() - start
    print(f"loss under attack {losses[0]:.3f} -> {losses[-1]:.3f} in {seconds:.1f} s")
    images, labels = (tensor[:100] for tensor in digits())
    found = attack(model.eval(), images, labels, 5, contextlib.nullcontext)
    for name, seen in (("clean", images), ("attacked", found)):
        with torch.no_grad():
            right = (model(seen).argmax(1) == labels).float().mean().item()
        print(f"accuracy, {name}: {100 * right:.0f} %")


if __name__ == "__main__":
    main()
