"""A learning-rate range test: which rate to start with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["LrCurve", "find_lr"]


@dataclass(frozen=True)
class LrCurve:
    """What a range test saw.

    Args:
        rates: learning rates, rising.
        losses: smoothed loss of the step at each.
        suggestion: a tenth of the rate at which the loss was lowest.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float


def find_lr(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
) -> LrCurve:
    """Train a copy of ``model`` while the learning rate rises, until the loss runs away.

    Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv 1506.01186). The suggestion
    is for a constant rate or the top of a schedule.

    Args:
        model: what is to be trained; it stays what it is.
        batches: inputs and targets; read again from the start where they are fewer than ``steps``.
        loss: of output and targets; default: cross-entropy.
        optimizer: makes one, of parameters and ``lr=``; ``functools.partial`` sets momentum and the
            like. Default: plain SGD.
        lowest, highest: the range of rates, in equal factors. Default 1e-6 to 1.
        steps: training steps, at least 2. Default 100.

    Returns:
        The rates that were tried, the loss at each, and a suggestion.

    Raises:
        ValueError: a bound is not positive, ``highest`` not above ``lowest``, ``steps`` below 2,
            there is no batch, or the loss is not finite in the first step.

    >>> model = torch.nn.Linear(2, 2)
    >>> batch = torch.randn(8, 2), torch.randint(0, 2, (8,))
    >>> curve = find_lr(model, [batch], lowest=1e-4, highest=1000.0)
    >>> curve.rates[0], 1e-4 < curve.suggestion < 1000.0
    (0.0001, True)
    """
    if not 0 < lowest < highest or not math.isfinite(highest):
        raise ValueError(f"rates must be 0 < lowest < highest, got {lowest} and {highest}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    model = copy.deepcopy(model)
    model.train()
    made = optimizer(model.parameters(), lr=lowest)
    rates: list[float] = []
    losses: list[float] = []
    mean, keep = 0.0, 0.9
    for step, (inputs, targets) in zip(range(steps), _again(batches), strict=False):
        rate = lowest * (highest / lowest) ** (step / (steps - 1))
        for group in made.param_groups:
            group["lr"] = rate
        made.zero_grad(set_to_none=True)
        value = loss(model(inputs), targets)
        mean = keep * mean + (1 - keep) * value.item()
        smoothed = mean / (1 - keep ** (step + 1))
        if not math.isfinite(smoothed) or (losses and smoothed > 4 * min(losses)):
            break
        rates.append(rate)
        losses.append(smoothed)
        value.backward()
        made.step()
    if not rates:
        raise ValueError("batches: the first gives no finite loss, or there is none")
    lowest_loss = min(range(len(losses)), key=losses.__getitem__)
    return LrCurve(tuple(rates), tuple(losses), rates[lowest_loss] / 10)


def _again(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    some = True
    while some:
        some = False
        for batch in batches:
            some = True
            yield batch
