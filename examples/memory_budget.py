"""Bias-only training under a memory budget: how large may a batch be?

    python examples/memory_budget.py [--budget MIB]

For each way to train, the largest batch whose activations (what a step saves for backward, and the
transformed weights that a skip window keeps) fit; then an epoch with it.
"""

import time

import torch
import torchvision
from options import options
from real_images import digits
from torch.nn.functional import cross_entropy

import wus_ext
from wus_ext.training.memory import saving

MIB = 2**20


def network(way: str):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    if way == "everything":
        return model
    if way == "stock, biases":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        return model
    wus_ext.convert(model, norm="frozen", memory_budget=16 * MIB)
    wus_ext.set_skip(model, True)
    return model


def step_memory(model, images, labels) -> float:
    """MiB between forward and backward."""
    with saving([*model.parameters(), *model.buffers(), images]) as saved:
        cross_entropy(model(images), labels)
    return (saved() + wus_ext.packed_bytes(model)) / MIB


def largest_batch(model, images, labels, budget: float) -> int:
    size = 1
    while (
        size < len(images) and step_memory(model, images[: 2 * size], labels[: 2 * size]) < budget
    ):
        size *= 2
    return size


def main(arguments=None) -> None:
    given = options(__doc__, arguments, budget=96.0, images=512)

    images, labels = (tensor[: given.images] for tensor in digits(size=64))
    for way in ("everything", "stock, biases", "wus_ext, biases"):
        model = network(way)
        size = largest_batch(model, images, labels, given.budget)
        memory = step_memory(model, images[:size], labels[:size])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        start = time.perf_counter()
        for batch in torch.randperm(len(images)).split(size):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        seconds = time.perf_counter() - start
        print(f"{way:<16} batch {size:>3}: {memory:5.1f} MiB, {seconds:5.1f} s an epoch")


if __name__ == "__main__":
    main()
