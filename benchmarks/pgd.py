"""A PGD attack (Madry et al., arXiv 1706.06083) through frozen weights: time and memory.

    python benchmarks/pgd.py                 # seven steps on ResNet-18, evaluation mode, batch 64
    python benchmarks/pgd.py --train         # batch statistics, as in adversarial training
    python benchmarks/pgd.py --models vgg16 resnet18 --steps 20

The gradient of the images is all that an attack needs. Stock runs as most people write it
(``loss.backward()``, every parameter requires gradients) and as it runs best (no parameter does,
``torch.autograd.grad``), each channels_last and NCHW; of either layout the faster one counts.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import NETWORKS, batch, machine, median_ms, saved_bytes, table
from torch import Tensor, nn

import wus_ext
from wus_ext.profiling.timing import interleaved, spread

MIB = 2**20
EPSILON, STEP = 8 / 255, 2 / 255
Gradient = Callable[[nn.Module, Tensor, Tensor], Tensor]


def attack(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, gradient: Gradient
) -> Tensor:
    """Images at most EPSILON away (infinity norm) that raise the loss."""
    perturbed = images
    for _ in range(steps):
        given = perturbed.detach().requires_grad_()
        moved = given.detach() + STEP * gradient(model, given, labels).sign()
        perturbed = images + (moved - images).clamp(-EPSILON, EPSILON)
    return perturbed


def by_backward(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    F.cross_entropy(model(images), labels).backward()
    return images.grad


def by_grad(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(F.cross_entropy(model(images), labels), images)
    return grad


class Attack:
    """One variant: a model in one memory layout, and how it gets the gradient."""

    def __init__(
        self,
        model: nn.Module,
        gradient: Gradient,
        args: argparse.Namespace,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        self.model = model.to(memory_format=layout).train(args.train)
        self.gradient, self.steps = gradient, args.steps
        images, self.labels = batch(args.batch_size, "cpu")
        self.images = images.contiguous(memory_format=layout)
        self.adversarial = self.images

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.adversarial = attack(self.model, self.images, self.labels, self.steps, self.gradient)

    def saved(self) -> int:
        images = self.images.clone().requires_grad_()
        kept = [*self.model.parameters(), *self.model.buffers(), images, self.labels]
        return saved_bytes(lambda: F.cross_entropy(self.model(images), self.labels), kept)


class SkipAttack(Attack):
    def __call__(self) -> None:
        with wus_ext.skip_weight_updates(self.model, skip_biases=True):
            super().__call__()

    def saved(self) -> int:
        with wus_ext.skip_weight_updates(self.model, skip_biases=True):
            return super().saved()


def settled(name: str) -> nn.Module:
    """A stock network whose running statistics have seen a few batches."""
    torch.manual_seed(0)
    model = wus_ext.revert(NETWORKS[name]())
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            model(torch.randn(64, 3, 32, 32))
    return model


def check(stock: Attack, skip: Attack) -> None:
    """The first step's gradient is stock's, before anything is timed."""
    wanted = by_grad(stock.model, stock.images.clone().requires_grad_(), stock.labels)
    with wus_ext.skip_weight_updates(skip.model, skip_biases=True):
        got = by_grad(skip.model, skip.images.clone().requires_grad_(), skip.labels)
    error = ((got - wanted).norm() / wanted.norm()).item()
    if error > 1e-2:
        raise SystemExit(f"gradient of the images: relative error {error:.1e}")
    print(f"relative error of the images' gradient: {error:.1e}")


def measure(name: str, args: argparse.Namespace) -> list[str]:
    stock = settled(name)
    frozen = copy.deepcopy(stock).requires_grad_(False)
    nchw = torch.contiguous_format
    made = {
        "backward": Attack(copy.deepcopy(stock), by_backward, args),
        "backward, NCHW": Attack(copy.deepcopy(stock), by_backward, args, nchw),
        "frozen": Attack(copy.deepcopy(frozen), by_grad, args),
        "frozen, NCHW": Attack(copy.deepcopy(frozen), by_grad, args, nchw),
        "skip": SkipAttack(wus_ext.convert(stock), by_grad, args),
    }
    if not args.train or name == "resnet18":  # dropout draws anew
        check(made["frozen"], made["skip"])
    seconds = interleaved(made, args.rounds)

    def best(variant: str) -> float:
        return min(median_ms(s) for key, s in seconds.items() if key.startswith(variant))

    skip = median_ms(seconds["skip"])
    return [
        name,
        str(args.batch_size),
        f"{best('backward'):.0f}",
        f"{best('frozen'):.0f}",
        f"{skip:.0f} ± {spread(seconds['skip']):.0%}",
        f"{skip / best('backward'):.2f}",
        f"**{skip / best('frozen'):.2f}**",
        " / ".join(
            f"{made[variant].saved() / MIB:.1f}" for variant in ("backward", "frozen", "skip")
        ),
    ]


HEADER = [
    "network",
    "batch",
    "stock backward, ms",
    "stock frozen, ms",
    "skip, ms",
    "skip / backward",
    "skip / frozen",
    "saved, MiB: backward / frozen / skip",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=["resnet18"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="batch statistics")
    args = parser.parse_args()
    mode = "training" if args.train else "evaluation"
    print(f"{machine()}; {args.steps} steps, {mode} mode, {args.rounds} rounds\n")
    rows = [measure(name, args) for name in args.models]
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
