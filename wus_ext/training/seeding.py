"""Every random number of an epoch derives from (seed, epoch), so that a run can resume exactly."""

from __future__ import annotations

import random

import torch

__all__ = ["generator", "mix"]


def mix(seed: int, *parts: int | str) -> int:
    """A 32-bit seed for one purpose, unrelated to that of any other purpose.

    torch's CPU generator uses only the lower 32 bits of its seed, hence no shifting and adding.

    >>> mix(0, "order", 1) == mix(0, "order", 1)
    True
    >>> mix(0, "order", 1) == mix(1, "order", 0)
    False
    """
    return random.Random("/".join(map(str, (seed, *parts)))).getrandbits(32)


def generator(device: torch.device | str, seed: int, *parts: int | str) -> torch.Generator:
    """A generator on ``device``, seeded with :func:`mix`."""
    return torch.Generator(device=device).manual_seed(mix(seed, *parts))
