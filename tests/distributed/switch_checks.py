"""Switching between full and skip steps: through which model, when, for which layers."""

from __future__ import annotations

import copy
import logging
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from torch import nn

import wus_ext

from .replicas import (
    DEVICE,
    WINDOWS,
    Net,
    Traffic,
    assert_near,
    batch,
    convert_the_inner_model_after,
    convert_then_wrap,
    loss,
    mean_backward,
    our_wrapper,
    reference,
    same_everywhere,
    same_everywhere_gradients,
    switch_the_inner_model,
    wrap_then_convert,
    wrapped,
)


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
