"""The steps of a skipped epoch: which of them skip, and at which learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..conversion.selection import Layers
from ..conversion.windows import set_skip

__all__ = ["skipped_epoch"]


@contextmanager
def skipped_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    layers: Layers | None = None,
    full_every: int | None = None,
    bias_lr: float = 1.0,
) -> Iterator[Callable[[int], bool]]:
    """Within a skip window, which is open before and after: what comes before each step.

    Args:
        model: what skips, as for :func:`wus_ext.set_skip`.
        optimizer: what trains it.
        layers: which layers skip, as for :func:`wus_ext.set_skip`.
        full_every: every so many steps a full one; ``None`` for skip steps only.
        bias_lr: factor of the learning rates in skip steps. In full steps and afterwards they are
            what they were, to the bit.

    Yields:
        A function of the number of the step to come, from 0: it switches the model and the
        learning rates, and says whether the step skips.

    >>> model = wus_ext.convert(nn.Linear(3, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> wus_ext.set_skip(model, True)
    >>> with skipped_epoch(model, optimizer, full_every=3, bias_lr=2.0) as begin:
    ...     [(begin(step), optimizer.param_groups[0]["lr"]) for step in range(3)]
    [(True, 1.0), (True, 1.0), (False, 0.5)]
    >>> wus_ext.is_skipping(model), optimizer.param_groups[0]["lr"]
    (True, 0.5)
    """
    rates = [group["lr"] for group in optimizer.param_groups]

    def scale(factor: float) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor

    skipping = True

    def switch(skip: bool) -> None:
        nonlocal skipping
        if skip != skipping:
            set_skip(model, skip, layers=layers)
            skipping = skip

    def begin(step: int) -> bool:
        switch(full_every is None or (step + 1) % full_every != 0)
        scale(bias_lr if skipping else 1.0)
        return skipping

    try:
        yield begin
    finally:
        switch(True)
        scale(1.0)
