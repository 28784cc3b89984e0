"""What DistributedDataParallel does in skip steps; every function runs in each process."""

from __future__ import annotations

import copy
import gc
import logging
import os
import re
import weakref
from collections import Counter
from contextlib import ExitStack, nullcontext, suppress
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel as StockDDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import wus_ext
from wus_ext.distributed import DistributedDataParallel

DEVICE = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if "BACKEND" in os.environ else "cpu"


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


def same_everywhere(model):
    """Parameters of `model` are equal in all processes, bit for bit."""
    mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)


def assert_near(model, expected, what="gradient", rtol=1e-4, atol=1e-6):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        a, b = (p.grad, q.grad) if what == "gradient" else (p, q)
        assert (a is None) == (b is None), f"{name}: {what} {a} instead of {b}"
        if a is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023


def reference(model):
    """A converted copy without a wrapper, to be fed with the batches of all processes."""
    return wus_ext.convert(copy.deepcopy(model))


def wrapped(model, **options):
    options.setdefault("device_ids", [DEVICE] if DEVICE != "cpu" else None)
    return StockDDP(model.to(DEVICE), **options)


def mean_backward(model, step, scale=1.0, ranks=None):
    """What all processes together should come to: the mean of their gradients, added up."""
    ranks = range(dist.get_world_size()) if ranks is None else ranks
    for rank in ranks:
        (loss(model(batch(step, rank))) * scale / len(ranks)).backward()


# Full steps


def check_full_steps_are_torchs_bit_for_bit():
    for options in ({}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}):
        torch.manual_seed(0)
        stock = wrapped(Net(), **options)
        aware = DistributedDataParallel(
            wus_ext.convert(copy.deepcopy(stock.module)),
            device_ids=stock.device_ids,
            **options,
        )
        for step in range(4):
            for ddp in (stock, aware):
                ddp.zero_grad()
                loss(ddp(batch(step))).backward()
            for p, q in zip(stock.parameters(), aware.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)
        for p, q in zip(stock.buffers(), aware.buffers(), strict=True):
            assert torch.equal(p, q)


# Switching


def check_a_wrapper_that_ran_skip_steps_is_freed_with_its_last_reference():
    model = wrapped(wus_ext.convert(Net()))
    wus_ext.set_skip(model, True)
    loss(model(batch(0))).backward()
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None


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


class Rebuilds(logging.Handler):
    def emit(self, record):
        self.count += "rebuilt" in record.getMessage()

    def __enter__(self):
        self.count, self.logger = 0, logging.getLogger("torch.nn.parallel.distributed")
        self.level_before = self.logger.level
        self.logger.addHandler(self)
        self.logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *error):
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level_before)


def switching(make, pattern="FFSSFSFSSFF", to_none=True, **options):
    torch.manual_seed(0)
    model = Net(norm=False).to(DEVICE)
    expected = reference(model)
    ddp, switch = make(model, **options)
    steps = [
        torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        for m in (model, expected)
    ]
    reducer = ddp.reducer
    with Rebuilds() as rebuilds:
        for step, kind in enumerate(pattern):
            for m in (switch, expected):
                wus_ext.set_skip(m, kind == "S")
            for optimizer in steps:
                optimizer.zero_grad(set_to_none=to_none)
            if not to_none and kind == "S":
                # zeros for weights would be stock's meaning of set_to_none=False: they are None
                assert model.conv.weight.grad is None
            loss(ddp(batch(step))).backward()
            mean_backward(expected, step)
            assert_near(model, expected)
            for optimizer in steps:
                optimizer.step()
            same_everywhere(model)
    assert_near(model, expected, "parameters")
    assert ddp.reducer is reducer
    assert rebuilds.count <= 1, f"buckets were rebuilt {rebuilds.count} times"


def check_switch_convert_then_wrap():
    switching(convert_then_wrap)


def check_switch_wrap_then_convert():
    switching(wrap_then_convert)


def check_switch_the_inner_model():
    switching(switch_the_inner_model)


def check_switch_convert_the_inner_model_after():
    switching(convert_the_inner_model_after)


def check_switch_our_wrapper():
    switching(our_wrapper)


def check_switch_starting_with_a_skip_step():
    for make in (convert_then_wrap, switch_the_inner_model):
        switching(make, "SSFFSFS")


def check_switch_bucket_views():
    switching(our_wrapper, gradient_as_bucket_view=True)
    switching(our_wrapper, gradient_as_bucket_view=True, to_none=False)
    switching(our_wrapper, to_none=False)


def check_switch_find_unused_parameters():
    switching(our_wrapper, find_unused_parameters=True)
    switching(switch_the_inner_model, find_unused_parameters=True)


def check_drop_in_layers_without_a_converted_root():
    def made():
        model = nn.Sequential(nn.Flatten(), wus_ext.nn.Linear(75, 4), wus_ext.nn.Linear(4, 2))
        return model, wrapped(model)

    model, ddp = made()
    expected = copy.deepcopy(model)
    for step, kind in enumerate("FSF"):
        for m in (ddp, expected):
            wus_ext.set_skip(m, kind == "S")
            m.zero_grad()
        loss(ddp(batch(step))).backward()
        mean_backward(expected, step)
        assert_near(model, expected)
    model, _ = made()
    if dist.get_world_size() > 1:
        with pytest.warns(UserWarning, match="switch the DistributedDataParallel wrapper"):
            wus_ext.set_skip(model, True)


def check_revert_gives_the_stock_wrapper_back():
    ddp = wrapped(wus_ext.convert(Net()))
    wus_ext.set_skip(ddp, True)
    assert type(ddp) is DistributedDataParallel
    wus_ext.revert(ddp)
    assert type(ddp) is StockDDP
    for step in range(2):
        loss(ddp(batch(step))).backward()
    assert ddp.module.conv.weight.grad is not None


def check_a_subclass_of_the_wrapper_stays_one():
    class Mine(StockDDP):
        pass

    ddp = Mine(wus_ext.convert(Net(norm=False).to(DEVICE)))
    wus_ext.set_skip(ddp, True)
    assert isinstance(ddp, Mine)
    loss(ddp(batch(0))).backward()
    expected = reference(ddp.module)
    expected.zero_grad()
    wus_ext.set_skip(expected, True)
    mean_backward(expected, 0)
    assert_near(ddp.module, expected)


def check_the_decision_is_read_in_forward():
    ddp = wrapped(wus_ext.convert(Net(norm=False)))
    expected = reference(ddp.module)
    for skip in (True, False):
        for model in (ddp, expected):
            model.zero_grad()
            wus_ext.set_skip(model, skip)
        output = ddp(batch(0))
        wus_ext.set_skip(ddp, not skip)
        loss(output).backward()
        mean_backward(expected, 0)
        assert_near(ddp.module, expected)


def check_a_forward_pass_without_backward_before_a_skip_step():
    for make in (our_wrapper, switch_the_inner_model, convert_the_inner_model_after):
        torch.manual_seed(0)
        ddp, _ = make(Net(norm=False))
        expected = reference(ddp.module)
        for step, kind in enumerate("FfSFfeSsfeSFfsFF"):  # lower case: no backward pass follows
            for model in (ddp.module, expected):
                model.zero_grad()
                wus_ext.set_skip(model, kind in "Ss")
            with torch.set_grad_enabled(kind != "e"):  # evaluation
                output = ddp(batch(step))
            if kind.isupper():
                loss(output).backward()
                mean_backward(expected, step)
                assert_near(ddp.module, expected)


def check_a_forward_pass_without_backward_before_conversion():
    model = Net(norm=False)
    ddp = wrapped(model)
    ddp(batch(0))
    wus_ext.convert(model)
    expected = reference(model)
    for step, kind in enumerate("SFSF"):
        for m in (model, expected):
            m.zero_grad()
            wus_ext.set_skip(m, kind == "S")
        loss(ddp(batch(step))).backward()
        mean_backward(expected, step)
        assert_near(model, expected)


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


class Failing:
    fails = True

    def __call__(self, grad):
        if self.fails:
            raise ZeroDivisionError


def check_evaluation_inside_a_window():
    ddp = wrapped(wus_ext.convert(Net()))
    wus_ext.set_skip(ddp, True)
    ddp.eval()
    with torch.no_grad():
        ddp(batch(0))
        ddp.module(batch(0))
    ddp.train()
    loss(ddp(batch(1))).backward()
    assert ddp.module.conv.weight.grad is None
    same_everywhere_gradients(ddp.module)


def same_everywhere_gradients(model):
    grads = [p.grad for p in model.parameters()]
    mine = torch.cat([g.flatten() for g in grads if g is not None])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)


# Some layers, input gradients only

WINDOWS = {
    "all": {},
    "some": {"layers": ["conv", "head.1"]},
    "some_biases": {"layers": ["conv", "head.1"], "skip_biases": True},
    "input_only": {"skip_biases": True},
}


def check_layers_and_biases_that_skip():
    """Windows of every kind between full steps, each restored to what was before."""
    for make in (convert_then_wrap, switch_the_inner_model, convert_the_inner_model_after):
        for view in (False, True):
            torch.manual_seed(0)
            model = Net(norm=False).to(DEVICE)
            expected = reference(model)
            ddp, switch = make(model, gradient_as_bucket_view=view)
            steps = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, expected)]
            for step, kind in enumerate(["full", *WINDOWS, "full", *reversed(WINDOWS)]):
                model.zero_grad(), expected.zero_grad()
                images = batch(step).requires_grad_()
                with ExitStack() as windows, Traffic() as traffic:
                    for m in (switch, expected) if kind in WINDOWS else ():
                        windows.enter_context(wus_ext.skip_weight_updates(m, **WINDOWS[kind]))
                    loss(ddp(images)).backward()
                    calls = list(traffic.calls)
                    if kind != "input_only":
                        mean_backward(expected, step)
                    trained = {name for name, p in model.named_parameters() if p.grad is not None}
                if kind in WINDOWS:
                    assert calls.count("allreduce_") == (kind != "input_only"), (kind, calls)
                assert ("conv.weight" in trained) == (kind == "full"), kind
                assert ("head.3.weight" in trained) == (kind in ("full", "some", "some_biases"))
                assert ("conv.bias" in trained) == (kind in ("full", "all", "some")), kind
                assert images.grad.abs().sum() > 0
                assert not wus_ext.is_skipping(ddp)
                assert_near(model, expected)
                for optimizer in steps:
                    optimizer.step()
                same_everywhere(model)


def check_join_while_layers_come_and_go():
    torch.manual_seed(0)
    model = Net(norm=False).to(DEVICE)
    expected = reference(model)
    ddp, _ = our_wrapper(model)
    optimizer, other = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, expected))
    kinds = ["some", "all", "some_biases", "some", "some_biases"]
    world = dist.get_world_size()
    counts = [3 + 2 * rank for rank in range(world)]
    with ddp.join():
        for step in range(counts[dist.get_rank()]):
            optimizer.zero_grad()
            with wus_ext.skip_weight_updates(ddp, **WINDOWS[kinds[step % 5]]):
                loss(ddp(batch(step))).backward()
            optimizer.step()
    for step in range(max(counts)):
        ranks = [rank for rank in range(world) if step < counts[rank]]
        other.zero_grad()
        with wus_ext.skip_weight_updates(expected, **WINDOWS[kinds[step % 5]]):
            mean_backward(expected, step, len(ranks) / world, ranks)
        other.step()
    same_everywhere(model)
    assert_near(model, expected, "parameters")


# Gradient accumulation


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


# Gradients that some processes lack


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


# Buffers, uneven inputs


def check_buffers_are_those_of_full_steps():
    torch.manual_seed(0)
    stock = wrapped(Net())
    ddp = wrapped(wus_ext.convert(copy.deepcopy(stock.module)))
    for step in range(3):
        wus_ext.set_skip(ddp, True)
        for model in (stock, ddp):
            loss(model(batch(step))).backward()
        for a, b in zip(stock.buffers(), ddp.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def join(kinds, *, norm, divide, make=our_wrapper):
    """Process r has 3 + 2 r inputs; every step switches as `kinds` says."""
    torch.manual_seed(0)
    model = Net(norm).to(DEVICE)
    expected = reference(model)
    ddp, _ = make(model)
    optimizer, other = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, expected))
    world = dist.get_world_size()
    counts = [3 + 2 * rank for rank in range(world)]
    with ddp.join(divide_by_initial_world_size=divide):
        for step in range(counts[dist.get_rank()]):
            wus_ext.set_skip(ddp, kinds[step] == "S")
            optimizer.zero_grad()
            loss(ddp(batch(step))).backward()
            optimizer.step()
    same_everywhere(model)
    if norm:
        return
    for step in range(max(counts)):
        wus_ext.set_skip(expected, kinds[step] == "S")
        other.zero_grad()
        ranks = [rank for rank in range(world) if step < counts[rank]]
        mean_backward(expected, step, len(ranks) / world if divide else 1.0, ranks)
        other.step()
    assert_near(model, expected, "parameters")


def check_join_inside_a_window():
    for norm in (False, True):
        for divide in (False, True):
            join("SSSSSSS", norm=norm, divide=divide)


def check_join_while_switching():
    for norm in (False, True):
        join("FSSFSFF", norm=norm, divide=True)
        join("SFFSFSF", norm=norm, divide=False, make=wrap_then_convert)


def check_a_stock_wrapper_inside_join_is_told_what_to_do():
    model = wus_ext.convert(Net(norm=False).to(DEVICE))
    ddp = wrapped(model)
    with ddp.join():
        refused(lambda: wus_ext.set_skip(ddp, True), "call wus_ext.convert on the wrapper before")


# What cannot work says so


def refused(run, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run()


def check_static_graph_is_refused():
    ddp = wrapped(wus_ext.convert(Net(norm=False)), static_graph=True)
    wus_ext.set_skip(ddp, True)
    refused(lambda: ddp(batch(0)), "static_graph=True promises")


def check_communication_hooks():
    def double(state, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer() * 2)
        return future

    ddp = wrapped(wus_ext.convert(Net(norm=False)))
    ddp.register_comm_hook(None, double)
    wus_ext.set_skip(ddp, True)
    refused(lambda: ddp(batch(0)), "double need not average gradients; use one of allreduce_hook")

    ddp = wrapped(wus_ext.convert(Net(norm=False)))
    ddp.register_comm_hook(dist.new_group(), default_hooks.allreduce_hook)
    wus_ext.set_skip(ddp, True)
    refused(lambda: ddp(batch(0)), "allreduce_hook has another process group; use the wrapper's")

    ddp = wrapped(wus_ext.convert(Net(norm=False)))
    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    expected = reference(ddp.module)
    for kind in "FSF":
        for model in (ddp, expected):
            wus_ext.set_skip(model, kind == "S")
            model.zero_grad()
        loss(ddp(batch(0))).backward()
        mean_backward(expected, 0)
        assert_near(ddp.module, expected, rtol=1e-2, atol=1e-3)


# The policy


def decisions(make_policy, accuracies):
    """What this process decides, after asserting that all processes decide the same."""
    model = wus_ext.convert(nn.Linear(2, 2).to(DEVICE))
    policy = make_policy(model)
    decided = [policy.step(accuracy) for accuracy in accuracies]
    others = [None] * dist.get_world_size()
    dist.all_gather_object(others, (decided, policy.state_dict()))
    assert all(other == others[0] for other in others)
    return decided, policy


def check_the_policy_decides_by_the_mean():
    rank = dist.get_rank()
    # Each process's own accuracy varies, the mean does not; and the other way round.
    for accuracies, expected in (
        ([50.0 + 5 * rank, 55.0 - 5 * rank, 52.5], [False, True, True]),
        ([50.0, 50.0 + 5 * rank, 50.0], [False, False, False]),
    ):
        decided, policy = decisions(
            lambda model: wus_ext.WUS(model, patience=1, warmup=0), accuracies
        )
        if dist.get_world_size() == 2:
            assert decided == expected
    assert policy.history[0] == 50.0


def check_a_plateau_watches_the_mean():
    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return wus_ext.WUSLR(model, scheduler, patience=1, warmup=0)

    rank = dist.get_rank()
    model = wus_ext.convert(nn.Linear(2, 2).to(DEVICE))
    policy = make(model)
    for metric in (3.0, 2.0 - rank, 1.0 + rank):  # rank 0 improves, rank 1 does not
        policy.step(50.0, metric=metric)
    rates = [None] * dist.get_world_size()
    dist.all_gather_object(rates, policy.scheduler.optimizer.param_groups[0]["lr"])
    assert len(set(rates)) == 1


def check_a_bad_accuracy_in_one_process_is_an_error_in_all():
    model = wus_ext.convert(nn.Linear(2, 2).to(DEVICE))
    policy = wus_ext.WUS(model)
    last = dist.get_world_size() - 1
    bad = float("nan") if dist.get_rank() == last else 50.0
    message = "accuracy must be" if dist.get_rank() == last else f"process {last}: accuracy must be"
    refused(lambda: policy.step(bad), message)
    assert policy.history == []


# Bytes


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


def traffic(ddp, skip):
    wus_ext.set_skip(ddp, skip)
    ddp.zero_grad()
    with Traffic() as counted:
        loss(ddp(torch.randn(2, 3, 32, 32, device=DEVICE))).backward()
    return counted


def send(build):
    ddp = wrapped(wus_ext.convert(build()))
    traffic(ddp, False)  # builds the buckets anew
    full, skip = traffic(ddp, False), traffic(ddp, True)
    everything = sum(p.numel() * 4 for p in ddp.parameters())
    assert full.bytes.total() >= everything
    assert 0 < skip.bytes.total() < full.bytes.total() / 100, (skip.bytes, full.bytes)
    assert skip.calls.count("allreduce_") == 1
    if dist.get_rank() == 0:
        print(f"{build.__name__}: full {dict(full.bytes)}, skip {dict(skip.bytes)} bytes")


def check_bytes_of_vgg16():
    send(wus_ext.models.vgg16)


def check_bytes_of_resnet18():
    send(wus_ext.models.resnet18)


# With the rest of PyTorch


def check_copies_inside_a_window():
    ddp = wrapped(wus_ext.convert(Net(norm=False)))
    wus_ext.set_skip(ddp, True)
    loss(ddp(batch(0))).backward()
    other = copy.deepcopy(ddp)
    assert type(other) is DistributedDataParallel
    for model in (ddp, other):
        model.zero_grad()
        loss(model(batch(1))).backward()
    for p, q in zip(ddp.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def check_compiled():
    for inside, told in product((True, False), (True, False)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = wus_ext.convert(Net(norm=False).to(DEVICE))
        expected = reference(model)
        if inside:
            ddp = wrapped(torch.compile(model, backend="aot_eager"))
        else:
            ddp = torch.compile(wrapped(model), backend="aot_eager")
        for step, kind in enumerate("FSFSS"):
            for m in (ddp if told else model, expected):
                wus_ext.set_skip(m, kind == "S")
            model.zero_grad(), expected.zero_grad()
            loss(ddp(batch(step))).backward()
            mean_backward(expected, step)
            assert_near(model, expected)


def check_half_precision():
    class Halved(Net):
        def forward(self, x):
            return self.head(self.conv(x.bfloat16()).relu().float()) * self.gain

    model = Halved(norm=False).to(DEVICE)
    model.conv.bfloat16()
    ddp = wrapped(wus_ext.convert(model))
    wus_ext.set_skip(ddp, True)
    loss(ddp(batch(0)).float()).backward()
    same_everywhere_gradients(model)
    assert model.conv.bias.grad.dtype == torch.bfloat16
