"""Whole training steps as CUDA graphs: one replay instead of hundreds of launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["CudaGraph", "StepGraphs"]

Step = Callable[[Tensor, Tensor], Any]


class CudaGraph:
    """A step recorded without being run; each :meth:`replay` runs it on the same memory.

    Args:
        step: takes no argument and waits for nothing on the device; what it returns is rewritten
            by each replay.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may pin the next batch's memory meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = step()

    def replay(self) -> Any:
        """Runs the step; returns its results."""
        self._graph.replay()
        return self._result

    @staticmethod
    def warm_up(step: Callable[[], Any]) -> Any:
        """Runs the step itself, on a stream of its own, as it must be before it is recorded."""
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = step()
        torch.cuda.current_stream().wait_stream(stream)
        return result


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all warm-ups: each stream keeps memory and workspaces of its own."""
    return torch.cuda.Stream(device)


class StepGraphs:
    """A training step that is run a few times, then recorded and replayed.

    One graph for each kind of step (full or skip) and size of batch; a size that is seen seldom,
    such as an incomplete last batch, is never recorded. The warm-up runs are steps of the training:
    they make the optimizer's state, cuDNN's plans and the window's transformed weights, whose
    addresses are then recorded. A new skip window transforms weights anew, so its steps are
    recorded anew; two windows need a full step between them to be told apart. The learning rate and
    every other number of Python is recorded too: make a new object when one changes, as each epoch
    does. Replays do not raise the version counters of what they change.

    Args:
        step: the whole step on images and labels, optimizer included.
        skipping: whether the next step is a skip step.
        graph: what records a step.

    >>> class Eager:  # what a graph does, without one
    ...     def __init__(self, step):
    ...         self.replay = step
    ...     warm_up = staticmethod(lambda step: step())
    >>> double = StepGraphs(lambda images, labels: images * 2, graph=Eager)
    >>> [double(torch.tensor([i]), torch.tensor([0])).item() for i in range(5)]
    [0, 2, 4, 6, 8]
    """

    WARM_UP = 3

    def __init__(
        self,
        step: Step,
        *,
        skipping: Callable[[], bool] = lambda: False,
        graph: Any = CudaGraph,
    ) -> None:
        self._step, self._skipping, self._graph = step, skipping, graph
        self._was_skipping = False
        self._runs: Counter[tuple[Any, ...]] = Counter()
        self._recorded: dict[Hashable, tuple[Any, Tensor, Tensor]] = {}

    def __call__(self, images: Tensor, labels: Tensor) -> Any:
        """One step; what it returns is rewritten by the next."""
        with torch.cuda.device_of(images):
            return self._run(images, labels)

    def _run(self, images: Tensor, labels: Tensor) -> Any:
        skipping = self._skipping()
        if skipping and not self._was_skipping:
            self._forget_skip_steps()
        self._was_skipping = skipping
        kind = (skipping, images.shape, images.stride(), images.dtype, labels.shape)
        self._runs[kind] += 1
        if self._runs[kind] <= self.WARM_UP:
            return self._graph.warm_up(lambda: self._step(images, labels))
        if kind not in self._recorded:
            own = images.clone(), labels.clone()
            self._recorded[kind] = (self._graph(lambda: self._step(*own)), *own)
        graph, own_images, own_labels = self._recorded[kind]
        own_images.copy_(images)
        own_labels.copy_(labels)
        return graph.replay()

    def _forget_skip_steps(self) -> None:
        for kind in [kind for kind in self._runs if kind[0]]:
            del self._runs[kind]
            self._recorded.pop(kind, None)
