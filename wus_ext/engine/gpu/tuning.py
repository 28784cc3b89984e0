"""Which of several ways to a result is taken on a GPU: the fastest one that is right."""

from __future__ import annotations

import logging
import statistics
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger("wus_ext")

Way = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Candidate:
    """A way to a result that this machine may not have."""

    exists: Callable[[], bool]
    run: Way


class Choices:
    """Which candidate replaces the trusted way to a result; found out once a problem.

    Args:
        seconds: times one call; for tests.
    """

    def __init__(self, seconds: Callable[[Way], float] | None = None) -> None:
        self._seconds = seconds or gpu_seconds
        self._chosen: dict[Hashable, int | None] = {}
        self._lock = threading.Lock()

    def best(self, key: Hashable, trusted: Way, candidates: Sequence[Candidate]) -> int | None:
        """Index of the fastest candidate that exists and agrees with the trusted way, if it is
        faster than that.

        While a CUDA graph is captured nothing is tried: what is not known yet takes the trusted
        way. Where the trusted result is not finite nothing can be compared, and it is tried again
        at the next call.
        """
        if key not in self._chosen and not capturing():
            with self._lock:
                if key not in self._chosen:
                    self._try(key, trusted, candidates)
        return self._chosen.get(key)

    def _try(self, key: Hashable, trusted: Way, candidates: Sequence[Candidate]) -> None:
        ways = {i: c.run for i, c in enumerate(candidates) if self._exists(key, c)}
        if not ways:
            logger.info("%s: no such kernel", key)
            self._chosen[key] = None
            return
        expected = trusted()
        if not all(bool(tensor.isfinite().all()) for tensor in expected):
            return
        right = {i: way for i, way in ways.items() if self._is_right(key, way, expected)}
        times: dict[int | None, float] = {None: self._seconds(trusted)}
        times |= {i: self._seconds(way) for i, way in right.items()}
        logger.info("%s: %s", key, {i: f"{seconds * 1e6:.1f} µs" for i, seconds in times.items()})
        self._chosen[key] = min(times, key=times.__getitem__)

    @staticmethod
    def _exists(key: Hashable, candidate: Candidate) -> bool:
        try:
            return candidate.exists()
        except RuntimeError as error:  # a model may come from a build that has more kernels
            logger.warning("%s: a kernel is not used, asking for it failed: %s", key, error)
            return False

    @staticmethod
    def _is_right(key: Hashable, way: Way, expected: tuple[Tensor, ...]) -> bool:
        try:
            actual = way()
        except RuntimeError as error:
            logger.warning("%s: a kernel is not used, it failed: %s", key, error)
            return False
        if not agree(actual, expected):
            logger.warning("%s: a kernel is not used, its result is wrong", key)
            return False
        return True


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
