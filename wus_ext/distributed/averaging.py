"""Gradients averaged over processes: one coalesced all-reduce for each dtype and device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["average_gradients"]


@torch.no_grad()
def average_gradients(
    parameters: Sequence[nn.Parameter],
    group: Any,
    device: torch.device,
    *,
    joined: bool = False,
    over_active: bool = False,
) -> None:
    """Replaces the gradients of ``parameters`` by their means over the processes of ``group``.

    Every process must call with the same parameters. One that lacks a gradient counts as zeros and
    gets the mean; a gradient that all lack stays None.

    Args:
        parameters: what trains, in the same order everywhere.
        group: the process group.
        device: where the group can send from.
        joined: this process has run out of inputs; it sends zeros and keeps its gradients.
        over_active: divide by the number of processes that have not joined, instead of by all.

    Raises:
        ValueError: if a gradient is sparse.
    """
    grads = [None if joined else parameter.grad for parameter in parameters]
    parts: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None and grad.is_sparse:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient, which a "
                "skip step cannot average; use sparse=False"
            )
        part = parts[parameter.dtype, parameter.device]
        part.append(torch.zeros_like(parameter) if grad is None else grad)
    # Who takes part, and who has which gradient, travels along.
    flags = [float(not joined), *(float(grad is not None) for grad in grads)]
    parts[torch.float32, device].append(torch.tensor(flags, device=device))

    means = {key: torch.cat([t.reshape(-1) for t in part]) for key, part in parts.items()}
    size = dist.get_world_size(group)
    # Divided before they are summed, as torch does: half precision shall not overflow.
    works = [
        dist.all_reduce(mean.div_(size), group=group, async_op=True) for mean in means.values()
    ]
    for work in works:
        work.wait()
    if joined:
        return
    active, *used = means[torch.float32, device][-len(flags) :].unbind()
    if over_active:
        # A copy: it is itself among what it divides.
        active = active.clone()
        for mean in means.values():
            mean.div_(active.to(mean.device))
    pieces = {key: iter(mean.split([t.numel() for t in parts[key]])) for key, mean in means.items()}
    for parameter, grad, is_used in zip(parameters, grads, used, strict=True):
        mean = next(pieces[parameter.dtype, parameter.device]).view(parameter.shape)
        if grad is not None:
            grad.copy_(mean)
        elif is_used:  # read only here, because reading waits for the device
            parameter.grad = torch.empty_like(parameter).copy_(mean)
