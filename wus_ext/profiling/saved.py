"""What autograd keeps between forward and backward, and the most that a call allocates."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["peak_bytes", "saving"]


@contextmanager
def saving(kept: Iterable[Tensor]) -> Iterator[Callable[[], int]]:
    """Count what autograd saves for backward meanwhile, each storage once.

    Args:
        kept: what lives anyway and does not count: parameters, buffers, inputs.

    Yields:
        A function that gives the bytes so far.

    >>> x = torch.ones(4, requires_grad=True)
    >>> with saving([x]) as saved:
    ...     y = x.exp()
    >>> saved()
    16
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in kept}
    sizes: dict[int, int] = {}
    held = []  # keeps an address from being used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor.detach()  # a saved output would hold its own graph, for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())
    held.clear()


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call has allocated at one time, beyond what was there before.

    By the allocator's own count on a GPU, else by the memory events of torch's profiler.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log goes to stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    peak = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
