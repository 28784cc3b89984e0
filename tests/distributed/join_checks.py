"""Processes with unequal numbers of batches: ``join``."""

from __future__ import annotations

import torch
import torch.distributed as dist

import wus_ext

from .replicas import (
    DEVICE,
    WINDOWS,
    Net,
    assert_near,
    batch,
    loss,
    mean_backward,
    our_wrapper,
    reference,
    refused,
    same_everywhere,
    wrap_then_convert,
    wrapped,
)


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


def check_a_stock_wrapper_inside_join_is_told_what_to_do():
    model = wus_ext.convert(Net(norm=False).to(DEVICE))
    ddp = wrapped(model)
    with ddp.join():
        refused(lambda: wus_ext.set_skip(ddp, True), "call wus_ext.convert on the wrapper before")
