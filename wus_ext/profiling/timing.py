"""Times of calls that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles

__all__ = ["interleaved", "spread"]


def interleaved(
    variants: Mapping[str, Callable[[], None]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call; the variants take turns, so that drift hits all alike."""
    for run in variants.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> float:
    """Half the distance between the quartiles, as a part of the median; 0 for one call.

    >>> round(spread([0.8, 1.0, 1.2]), 3)
    0.2
    """
    if len(seconds) == 1:
        return 0.0
    low, _, high = quantiles(seconds, n=4)
    return (high - low) / 2 / median(seconds)
