"""Policies: all processes decide the same, by the mean accuracy."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import wus_ext

from .replicas import DEVICE, refused


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
