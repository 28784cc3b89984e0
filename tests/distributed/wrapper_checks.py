"""What skip steps leave of the stock wrapper: full steps, buffers, copies, torch.compile, hooks."""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import product

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel as StockDDP

import wus_ext
from wus_ext.distributed import DistributedDataParallel

from .replicas import (
    DEVICE,
    Net,
    assert_near,
    batch,
    loss,
    mean_backward,
    reference,
    refused,
    same_everywhere_gradients,
    wrapped,
)


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


def check_a_wrapper_that_ran_skip_steps_is_freed_with_its_last_reference():
    model = wrapped(wus_ext.convert(Net()))
    wus_ext.set_skip(model, True)
    loss(model(batch(0))).backward()
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None


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
