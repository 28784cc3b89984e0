"""Transfer learning: a network that knows the digits 0 to 4 learns 5 to 9.

    python examples/transfer_learning.py [--epochs N]

It is trained whole, by its biases and last layer, or by its last layer alone.
"""

import copy
import time

import torch
from network import network
from options import options
from real_images import digits
from torch import nn
from torch.nn.functional import cross_entropy

import wus_ext

#: What trains, and how its skip steps are asked for; the last layer trains in any case.
WAYS = {
    "everything": None,
    "biases, last layer": {},
    "last layer": {"skip_biases": True},
}
LAST = "16"


def student(teacher, way):
    model = wus_ext.convert(copy.deepcopy(teacher), norm="frozen")
    model.get_submodule(LAST).reset_parameters()  # new classes
    if WAYS[way] is not None:
        wus_ext.set_skip(model, True, **WAYS[way])
        wus_ext.set_skip(model, False, layers=LAST)
    return model


def train(model: nn.Module, images, labels, epochs: int, lr: float = 0.02) -> float:
    """Seconds that it took."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, images, labels) -> float:
    return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def main(arguments=None) -> None:
    given = options(__doc__, arguments, epochs=5, images=400)

    torch.manual_seed(0)
    images, labels = digits()
    old, new = images[labels < 5], images[labels > 4]
    old_labels, new_labels = labels[labels < 5], labels[labels > 4] - 5
    train(teacher := network(5), old[: given.images], old_labels[: given.images], given.epochs)
    for way in WAYS:
        model = student(teacher, way)
        seconds = train(model, new[: given.images], new_labels[: given.images], given.epochs)
        right = accuracy(model, new[-200:], new_labels[-200:])
        print(f"{way:<20} {seconds:6.1f} s   accuracy {right:.1f} %")


if __name__ == "__main__":
    main()
