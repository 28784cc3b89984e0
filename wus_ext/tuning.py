"""Which of two ways to the same result is taken on a GPU: the faster one, if it is right."""

from __future__ import annotations

import logging
import statistics
import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

logger = logging.getLogger("wus_ext")

Way = Callable[[], tuple[Tensor, ...]]


class Choices:
    """Whether a candidate replaces the trusted way to a result; found out once a problem.

    Args:
        seconds: times one call; for tests.
    """

    def __init__(self, seconds: Callable[[Way], float] | None = None) -> None:
        self._seconds = seconds or gpu_seconds
        self._chosen: dict[Hashable, bool] = {}
        self._lock = threading.Lock()

    def prefer(
        self, key: Hashable, exists: Callable[[], bool], candidate: Way, trusted: Way
    ) -> bool:
        """Whether the candidate exists, agrees with the trusted way and is faster.

        While a CUDA graph is captured nothing is tried: what is not known yet takes the trusted
        way. Where the trusted result is not finite nothing can be compared, and it is tried again
        at the next call.
        """
        if key not in self._chosen:
            if capturing():
                return False
            with self._lock:
                if key not in self._chosen:
                    chosen = self._try(key, exists, candidate, trusted)
                    if chosen is None:
                        return False
                    self._chosen[key] = chosen
        return self._chosen[key]

    def _try(
        self, key: Hashable, exists: Callable[[], bool], candidate: Way, trusted: Way
    ) -> bool | None:
        if not exists():
            logger.info("%s: no such kernel", key)
            return False
        expected = trusted()
        if not all(bool(tensor.isfinite().all()) for tensor in expected):
            return None
        try:
            actual = candidate()
        except RuntimeError as error:
            logger.warning("%s: not used, it failed: %s", key, error)
            return False
        if not agree(actual, expected):
            logger.warning("%s: not used, its result is wrong", key)
            return False
        ours, theirs = self._seconds(candidate), self._seconds(trusted)
        logger.info("%s: %.1f µs, two passes %.1f µs", key, ours * 1e6, theirs * 1e6)
        return ours < theirs


def agree(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Whether results are the same but for rounding in the type of the first one."""
    tolerance = 4 * torch.finfo(expected[0].dtype).eps
    if expected[0].dtype == torch.float32:
        tolerance = 4e-3 if expected[0].is_cuda else 1e-5  # a GPU may multiply in TF32
    for mine, theirs in zip(actual, expected, strict=True):
        error, size = (mine.float() - theirs.float()).norm(), theirs.float().norm()
        if not bool(error <= tolerance * size):  # NaN is an error
            return False
    return True


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def gpu_seconds(run: Way, rounds: int = 5, calls: int = 3) -> float:
    """Median time of a call on the current stream."""
    run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)
