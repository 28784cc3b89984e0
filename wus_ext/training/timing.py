"""Time of single steps, without waiting for the GPU after each."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

__all__ = ["StepTimer", "synchronize"]


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepTimer:
    """Times steps with the clock on a CPU and with events on a GPU.

    >>> timer = StepTimer(torch.device("cpu"))
    >>> with timer:
    ...     pass
    >>> timer.median() >= 0
    True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._start = self._mark()

    def __exit__(self, *error: object) -> None:
        self._spans.append((self._start, self._mark()))

    def median(self) -> float:
        """Median of the steps so far, in seconds; NaN before the first."""
        if not self._spans:
            return float("nan")
        if self.device.type == "cuda":
            synchronize(self.device)
            return median(start.elapsed_time(end) for start, end in self._spans) / 1000
        return median(end - start for start, end in self._spans)

    def _mark(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
