"""When gradients are synchronised: accumulation, several passes, gradients that are missing."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import wus_ext

from .replicas import Net, Traffic, assert_near, batch, loss, mean_backward, reference, wrapped


def accumulate(pattern, **options):
    """F, S: synchronised steps; f, s: under no_sync. One zero_grad before all of them."""
    torch.manual_seed(0)
    ddp = wrapped(wus_ext.convert(Net(norm=False)), **options)
    expected = reference(ddp.module)
    for step, kind in enumerate(pattern):
        for model in (ddp, expected):
            wus_ext.set_skip(model, kind in "Ss")
        with ddp.no_sync() if kind.islower() else nullcontext():
            loss(ddp(batch(step))).backward()
        mean_backward(expected, step)
    assert_near(ddp.module, expected)


def check_accumulation():
    for pattern in ("sS", "ssS", "fS", "sF", "fsS", "fsF", "sfF", "SS", "SF", "FS", "sSsS", "SsF"):
        for view in (False, True):
            accumulate(pattern, gradient_as_bucket_view=view)


def check_no_sync_sends_nothing():
    ddp = wrapped(wus_ext.convert(Net(norm=False)))
    wus_ext.set_skip(ddp, True)
    with Traffic() as traffic, ddp.no_sync():
        loss(ddp(batch(0))).backward()
    assert traffic.bytes.total() == 0
    with Traffic() as traffic:
        loss(ddp(batch(1))).backward()
    assert traffic.calls == ["allreduce_"]


def check_several_forward_passes_before_backward():
    ddp = wrapped(wus_ext.convert(Net(norm=False)))
    expected = reference(ddp.module)
    for model in (ddp, expected):
        wus_ext.set_skip(model, True)
    with Traffic() as traffic:
        (loss(ddp(batch(0))) + loss(ddp(batch(1)))).backward()
    assert traffic.calls == ["allreduce_"]
    for step in (0, 1):
        mean_backward(expected, step)
    assert_near(ddp.module, expected)


def check_two_steps_at_once():
    """The second forward pass comes before the first backward pass."""
    for kinds in ("FS", "SF"):
        for order in ((0, 1), (1, 0), None):  # None: one backward pass of both
            for view in (False, True):
                torch.manual_seed(0)
                ddp = wrapped(wus_ext.convert(Net(norm=False)), gradient_as_bucket_view=view)
                expected = reference(ddp.module)
                for _ in range(2):
                    losses = []
                    ddp.zero_grad(), expected.zero_grad()
                    for step, kind in enumerate(kinds):
                        with wus_ext.skip_weight_updates(ddp) if kind == "S" else nullcontext():
                            losses.append(loss(ddp(batch(step))))
                    ddp.zero_grad()
                    for step in order or ():
                        losses[step].backward()
                    if order is None:
                        sum(losses).backward()
                    for step, kind in sorted(enumerate(kinds), key=lambda pair: pair[1] == "F"):
                        wus_ext.set_skip(expected, kind == "S")
                        mean_backward(expected, step)
                    assert_near(ddp.module, expected)


def check_unused_parameters_cannot_be_found_twice():
    ddp = wrapped(wus_ext.convert(Net(norm=False)), find_unused_parameters=True)
    full = loss(ddp(batch(0)))
    with wus_ext.skip_weight_updates(ddp):
        loss(ddp(batch(1))).backward()
    with pytest.raises(RuntimeError, match="must come before that of a later skip step"):
        full.backward()
    ddp.zero_grad()
    loss(ddp(batch(2))).backward()
    expected = reference(ddp.module)
    expected.zero_grad()
    mean_backward(expected, 2)
    assert_near(ddp.module, expected)


def check_reentrant_checkpoints_synchronise_once():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(75, 75) for _ in range(3))

        def forward(self, x):
            x = x.flatten(1)
            for i, block in enumerate(self.blocks):
                x = checkpoint(block, x, use_reentrant=True) if i else block(x)
            return x

    ddp = wrapped(wus_ext.convert(Checkpointed()))
    expected = reference(ddp.module)
    for model in (ddp, expected):
        wus_ext.set_skip(model, True)
    with Traffic() as traffic:
        loss(ddp(batch(0))).backward()
    assert traffic.calls == ["allreduce_"]
    mean_backward(expected, 0)
    assert_near(ddp.module, expected)


class Failing:
    fails = True

    def __call__(self, grad):
        if self.fails:
            raise ZeroDivisionError


def check_an_error_in_backward_of_a_skip_step():
    ddp = wrapped(wus_ext.convert(Net(norm=False)))
    expected = reference(ddp.module)
    for model in (ddp, expected):
        wus_ext.set_skip(model, True)
    ddp.module.conv.bias.register_hook(hook := Failing())
    with suppress(ZeroDivisionError):
        loss(ddp(batch(0))).backward()
    hook.fails = False
    ddp.zero_grad()
    loss(ddp(batch(1))).backward()
    mean_backward(expected, 1)
    assert_near(ddp.module, expected)


class Branches(nn.Module):
    """Branch 0 and 1 have a bias each, branch 2 has none; the last layer is never used."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(75, 2) for _ in range(2))
        self.branches.append(nn.Linear(75, 2, bias=False))
        self.never = nn.Linear(75, 2)

    def forward(self, x, branch):
        return self.branches[branch](x.flatten(1))


def branched(*branches):
    """Processes take these branches in turn."""
    ddp = wrapped(wus_ext.convert(Branches()), find_unused_parameters=True)
    wus_ext.set_skip(ddp, True)
    images = batch(0).requires_grad_()
    loss(ddp(images, branches[dist.get_rank() % 2])).backward()
    expected = reference(ddp.module)
    expected.zero_grad()
    wus_ext.set_skip(expected, True)
    world = dist.get_world_size()
    for rank in range(world):
        images = batch(0, rank).requires_grad_()
        (loss(expected(images, branches[rank % 2])) / world).backward()
    assert_near(ddp.module, expected)


def check_a_gradient_that_one_process_lacks():
    branched(0, 1)


def check_a_gradient_that_every_process_lacks_stays_none():
    branched(1, 1)


def check_a_process_without_any_gradient():
    branched(0, 2)


def check_outputs_of_any_kind():
    class Box:
        def __init__(self, tensor):
            self.tensor = tensor

    class Boxed(nn.Module):
        def __init__(self, box):
            super().__init__()
            self.linear, self.box = nn.Linear(75, 2), box

        def forward(self, x):
            return self.box(self.linear(x.flatten(1)))

    for box, unbox in (
        (lambda y: {"a": [y, None], "b": 1}, lambda o: o["a"][0]),
        (Box, lambda o: o.tensor),  # nobody can look into it
    ):
        torch.manual_seed(0)
        ddp = wrapped(wus_ext.convert(Boxed(box)))
        expected = reference(ddp.module)
        for model in (ddp, expected):
            wus_ext.set_skip(model, True)
        loss(unbox(ddp(batch(0)))).backward()
        for rank in range(dist.get_world_size()):
            (loss(unbox(expected(batch(0, rank)))) / dist.get_world_size()).backward()
        assert_near(ddp.module, expected)
