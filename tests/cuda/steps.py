"""A step of a linked model: its results, and the same from a CUDA graph."""

from __future__ import annotations

import torch


def results(model, x, g, autocast=None):
    """The output and the gradients of the input and of every bias."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        y = model(x)
    y.backward(g.to(y.dtype).expand_as(y))
    return [y, x.grad, *(p.grad for n, p in model.named_parameters() if n.endswith("bias"))]


def check_replay(model, x, g):
    """A recorded step gives what an eager one gives."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = results(model, x, g)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = results(model, x, g)
    for result in recorded:
        result.data.zero_()
    graph.replay()
    for mine, theirs in zip(recorded, expected, strict=True):
        assert torch.equal(mine, theirs)
