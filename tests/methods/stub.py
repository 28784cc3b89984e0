"""A model that only remembers how it was switched, and policies, rates and runs for it."""

from __future__ import annotations

import copy
import io

import torch
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from wus_ext.methods.policy import WUS, WUSLR


class Model:
    """Stands for a converted model: remembers how it was switched."""

    def __init__(self):
        self.switched = []

    @property
    def skipping(self):
        return self.switched[-1]


FLAT = [60.0] * 16

OPTIONS = st.fixed_dictionaries(
    {
        "threshold": st.sampled_from([0.5, 1.0, 2.0]),
        "patience": st.integers(1, 3),
        "max_window": st.integers(1, 4),
        "warmup": st.integers(0, 6),
        "min_open": st.integers(1, 3),
    }
)
# Quarters of a point around 60 %: variations on both sides of every threshold, without rounding.
ACCURACIES = st.lists(st.integers(0, 8).map(lambda i: 60 + i / 4), min_size=1, max_size=24)


def marks(decisions):
    """Decisions as text: the n-th mark is what the policy said after epoch n."""
    return "".join("S" if skip else "." for skip in decisions)


def make_optimizer(*lrs, cls=torch.optim.SGD):
    return cls([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs])


def make(method, scheduler=None, **options):
    if method == "WUS":
        return WUS(Model(), **options)
    scheduler = scheduler or constant(make_optimizer(0.1))
    scheduler.optimizer.step()  # torch warns of a scheduler that is stepped first
    return WUSLR(Model(), scheduler, **options)


def constant(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)


def factors(*values):
    """A scheduler whose n-th epoch (from 1) has ``values[n - 1]`` times the initial rate."""
    return lambda optimizer: lr_scheduler.LambdaLR(
        optimizer, lambda epoch: values[min(epoch, len(values) - 1)]
    )


def snapshot(policy):
    state = copy.deepcopy(policy.state_dict())
    if isinstance(policy, WUSLR):
        state["scheduler"] = copy.deepcopy(policy.scheduler.state_dict())
        state["lrs"] = [group["lr"] for group in policy.scheduler.optimizer.param_groups]
    return state, list(policy.model.switched)


def run_lr(policy, accuracies, **kwargs):
    decisions = []
    for accuracy in accuracies:
        policy.scheduler.optimizer.step()
        decisions.append(policy.step(accuracy, **kwargs))
        assert policy.skipping is decisions[-1] is policy.model.skipping
    return marks(decisions)


SCHEDULERS = {
    "constant": constant,
    "step": lambda o: lr_scheduler.StepLR(o, 4, gamma=0.1),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [3, 4, 9], gamma=0.2),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.75),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=30, cycle_momentum=False),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, mode="max", patience=2),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.StepLR(o, 3)], [4]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
