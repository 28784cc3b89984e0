"""What a step keeps in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..conversion.convert import packed_bytes
from ..profiling.saved import saving

__all__ = ["StepMemory"]


class StepMemory:
    """Most memory that a step of training takes beyond what lives between steps.

    On a GPU that is the allocator's peak since this object was made; on the CPU, what the first
    step of each kind saves for backward, and the transformed weights that it keeps.

    >>> memory, model = StepMemory(torch.device("cpu")), nn.Linear(4, 2)
    >>> x = torch.ones(3, 4, requires_grad=True)
    >>> with memory.of_forward(model, x, skipping=False):
    ...     y = model(x).exp()
    >>> memory.peak()
    24
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._saved: dict[bool, int] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def of_forward(
        self, model: nn.Module, *inputs: Tensor, skipping: bool
    ) -> AbstractContextManager[object]:
        """What to run the forward pass of a step in."""
        if self._device.type == "cuda" or skipping in self._saved:
            return nullcontext()
        return self._measured(model, *inputs, skipping=skipping)

    @contextmanager
    def _measured(self, model: nn.Module, *inputs: Tensor, skipping: bool) -> Iterator[None]:
        with saving([*model.parameters(), *model.buffers(), *inputs]) as saved:
            yield
        self._saved[skipping] = saved() + packed_bytes(model)

    def peak(self) -> int:
        """Bytes so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(self._saved.values(), default=0)
