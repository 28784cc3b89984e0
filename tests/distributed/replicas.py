"""A model in every process, what all of them should come to, what they send."""

from __future__ import annotations

import copy
import os
import re
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as StockDDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wus_ext
from wus_ext.distributed import DistributedDataParallel

DEVICE = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if "BACKEND" in os.environ else "cpu"

WINDOWS = {
    "all": {},
    "some": {"layers": ["conv", "head.1"]},
    "some_biases": {"layers": ["conv", "head.1"], "skip_biases": True},
    "input_only": {"skip_biases": True},
}


class Net(nn.Module):
    """Convolution, batch norm, linear, a parameter of its own; every kind of gradient."""

    def __init__(self, norm=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 25, 6), nn.ReLU(), nn.Linear(6, 2))
        self.gain = nn.Parameter(torch.rand(2))

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu()) * self.gain


def batch(step, rank=None):
    """The images of a process in a step, (4, 3, 5, 5); any process can make those of another."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(4, 3, 5, 5, generator=generator).to(DEVICE)


def loss(output, seed=0):
    weights = torch.rand(output.shape, generator=torch.Generator().manual_seed(seed))
    return (output.square() * weights.to(output.device)).mean()


def wrapped(model, **options):
    options.setdefault("device_ids", [DEVICE] if DEVICE != "cpu" else None)
    return StockDDP(model.to(DEVICE), **options)


def convert_then_wrap(model, **options):
    ddp = wrapped(wus_ext.convert(model), **options)
    return ddp, ddp


def wrap_then_convert(model, **options):
    ddp = wus_ext.convert(wrapped(model, **options))
    return ddp, ddp


def switch_the_inner_model(model, **options):
    return wrapped(wus_ext.convert(model), **options), model


def convert_the_inner_model_after(model, **options):
    ddp = wrapped(model, **options)
    return ddp, wus_ext.convert(model)


def our_wrapper(model, **options):
    device_ids = [DEVICE] if DEVICE != "cpu" else None
    ddp = DistributedDataParallel(
        wus_ext.convert(model.to(DEVICE)), device_ids=device_ids, **options
    )
    return ddp, ddp


def reference(model):
    """A converted copy without a wrapper, to be fed with the batches of all processes."""
    return wus_ext.convert(copy.deepcopy(model))


def mean_backward(model, step, scale=1.0, ranks=None):
    """What all processes together should come to: the mean of their gradients, added up."""
    ranks = range(dist.get_world_size()) if ranks is None else ranks
    for rank in ranks:
        (loss(model(batch(step, rank))) * scale / len(ranks)).backward()


def assert_near(model, expected, what="gradient", rtol=1e-4, atol=1e-6):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        a, b = (p.grad, q.grad) if what == "gradient" else (p, q)
        assert (a is None) == (b is None), f"{name}: {what} {a} instead of {b}"
        if a is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023


def same_everywhere(model):
    """Parameters of `model` are equal in all processes, bit for bit."""
    mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)


def same_everywhere_gradients(model):
    grads = [p.grad for p in model.parameters()]
    mine = torch.cat([g.flatten() for g in grads if g is not None])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)


def refused(run, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run()


class Traffic(TorchDispatchMode):
    """Counts what is handed to collectives, torch's reducer included."""

    def __enter__(self):
        self.bytes, self.calls = Counter(), []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._overloadpacket.__name__
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.bytes[name] += sum(t.numel() * t.element_size() for t in tensors)
            self.calls.append(name)
        return func(*args, **(kwargs or {}))
