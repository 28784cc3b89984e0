"""Learning-rate schedules: a drop closes the window, and every scheduler is stepped as alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.optim import lr_scheduler

from wus_ext.methods.policy import WUSLR

from .stub import FLAT, SCHEDULERS, Model, constant, factors, make, make_optimizer, run_lr, snapshot

# Always flat, warm-up 0, patience 1, max_window 3: without drops ".SSS.SSS".
LR_CADENCE = {
    "constant": (constant, {}, ".SSS.SSS"),
    "drop in a window closes it, then weights train one epoch": (
        factors(1, 1, 1, 0.1),
        {},
        ".S.SSS.S",
    ),
    "drop where a window would open: it opens an epoch later": (
        factors(1, 1, 0.1),
        {},
        "..SSS.SS",
    ),
    "drop in the last epoch of a window: nothing changes": (
        factors(1, 1, 1, 1, 1, 0.1),
        {},
        ".SSS.SSS",
    ),
    "drop in the epoch that trains between windows": (
        factors(1, 1, 1, 1, 1, 1, 0.1),
        {},
        ".SSS..SS",
    ),
    "drop to exactly lr_drop is one": (factors(1, 1, 1, 0.5), {}, ".S.SSS.S"),
    "drop to a little more is none": (factors(1, 1, 1, 0.51), {}, ".SSS.SSS"),
    "rounding does not matter": (factors(1, 1, 1, 0.1 * 3), {"lr_drop": 0.3}, ".S.SSS.S"),
    "lr_drop 0.9": (factors(1, 1, 1, 0.9), {"lr_drop": 0.9}, ".S.SSS.S"),
    "decay that adds up within a window": (
        factors(1, 1, 0.9, 0.7, 0.5),
        {},
        ".SS.SSS.",
    ),
    "the opening rate is the last trained epoch's, before the step": (
        factors(1, 1, 0.8, 0.5),
        {},
        ".S.SSS.S",
    ),
    "decay that does not add up within a window": (
        factors(1, 1, 0.9, 0.8, 0.7, 0.6, 0.6, 0.5, 0.4),
        {},
        ".SSS.SSS",
    ),
    "a rise is a jump, too": (factors(0.1, 0.1, 0.1, 1), {}, ".S.SSS.S"),
    "a rise to exactly 1 / lr_drop times is one": (factors(0.5, 0.5, 0.5, 1), {}, ".S.SSS.S"),
    "a rise to a little less is none": (factors(0.51, 0.51, 0.51, 1), {}, ".SSS.SSS"),
    "a warm restart reopens weight updates": (
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=6),
        {"lr_drop": 0.1},
        ".SSS..SS",
    ),
    "a rise from 0 is a jump": (factors(0, 0, 0, 1), {}, ".S.SSS.S"),
    "a drop below the opening rate counts, one from a peak within the window does not": (
        factors(0.6, 0.6, 1, 1, 0.5),
        {},
        ".SSS.SSS",
    ),
    "a rate of 0 does not block": (factors(0, 0, 0, 0), {}, ".SSS.SSS"),
    "a drop to 0 is one": (factors(1, 1, 1, 0), {}, ".S.SSS.S"),
    "drops in every epoch: weights train": (factors(*(0.5**i for i in range(9))), {}, "........"),
    "a drop and min_open": (factors(1, 1, 1, 0.1), {"min_open": 2}, ".S..SSS."),
}


@pytest.mark.parametrize(
    ("schedule", "options", "expected"), LR_CADENCE.values(), ids=LR_CADENCE.keys()
)
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_lr_cadence(schedule, options, expected, optimizer_class):
    scheduler = schedule(make_optimizer(0.1, cls=optimizer_class))
    policy = make("WUSLR", scheduler, **{"warmup": 0, "patience": 1, **options})
    assert run_lr(policy, FLAT[:8]) == expected


def test_a_drop_in_any_parameter_group_counts():
    optimizer = make_optimizer(0.1, 0.01, 0.0)
    schedule = [lambda e: 1.0, lambda e: 1.0 if e < 3 else 0.1, lambda e: 1.0]
    policy = make("WUSLR", lr_scheduler.LambdaLR(optimizer, schedule), warmup=0, patience=1)
    assert run_lr(policy, FLAT[:8]) == ".S.SSS.S"


def test_tensor_learning_rate():
    optimizer = make_optimizer(torch.tensor(0.1))
    scheduler = lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    policy = make("WUSLR", scheduler, warmup=0, patience=1)
    assert run_lr(policy, FLAT[:5]) == ".S.SS"


def test_step_steps_the_scheduler_once():
    optimizer = make_optimizer(0.1)
    policy = make("WUSLR", lr_scheduler.ExponentialLR(optimizer, gamma=0.5))
    run_lr(policy, [50.0, 60.0])
    assert optimizer.param_groups[0]["lr"] == 0.025


def test_cosine_does_not_thrash():
    """On a flat run over 100 epochs no window closes early until the rate all but vanishes."""
    optimizer = make_optimizer(0.1)
    policy = make("WUSLR", lr_scheduler.CosineAnnealingLR(optimizer, 100), warmup=0, patience=1)
    assert run_lr(policy, [60.0] * 92) == "." + "SSS." * 22 + "SSS"


def test_plateau_watches_the_accuracy_and_its_drop_closes_the_window():
    optimizer = make_optimizer(0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=1, factor=0.1)
    policy = make("WUSLR", scheduler, warmup=0, patience=1, max_window=9)
    # Best after epoch 2; bad epochs 3 and 4, so the rate drops after epoch 4.
    assert run_lr(policy, [59.5, 60, 60, 60, 60]) == ".SS.S"
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_plateau_watches_a_metric_when_given():
    optimizer = make_optimizer(0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    policy = make("WUSLR", scheduler, warmup=0, patience=1, max_window=9)
    for loss, skip in ((1.0, False), (0.9, True), (torch.tensor(0.8), True), (0.8, False)):
        assert policy.step(60.0, metric=loss) is skip


def test_plateau_of_the_wrong_mode_warns():
    scheduler = lr_scheduler.ReduceLROnPlateau(make_optimizer(0.1))
    with pytest.warns(UserWarning, match="mode='max'"):
        make("WUSLR", scheduler).step(60.0)


def test_metric_for_another_scheduler_is_refused():
    policy = make("WUSLR")
    before = snapshot(policy)
    with pytest.raises(ValueError, match=r"metric .*LambdaLR"):
        policy.step(60.0, metric=1.0)
    assert snapshot(policy) == before


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_works_with_every_scheduler(schedule):
    """Same rates as without the policy; a window never spans a drop, and none opens after one."""
    alone, optimizer = make_optimizer(0.1, 0.02), make_optimizer(0.1, 0.02)
    reference = schedule(alone)
    policy = make("WUSLR", schedule(optimizer), warmup=0, patience=1)
    trained, skipped = None, 0
    for _ in range(20):
        rates = [group["lr"] for group in alone.param_groups]
        trained = trained if policy.skipping else rates
        for o in (alone, optimizer):
            o.step()
        skip = policy.step(60.0)
        reference.step(*([60.0] if isinstance(reference, lr_scheduler.ReduceLROnPlateau) else []))
        now = [group["lr"] for group in alone.param_groups]
        assert [group["lr"] for group in optimizer.param_groups] == now
        dropped = any(new <= 0.5 * old for new, old in zip(now, trained, strict=True))
        assert not (skip and dropped)
        skipped += skip
    assert skipped > 5


@pytest.mark.parametrize(
    "scheduler",
    [None, 0.1, make_optimizer(0.1), SimpleNamespace(step=lambda: None)],
    ids=["none", "number", "optimizer", "no optimizer"],
)
def test_not_a_scheduler_is_refused(scheduler):
    with pytest.raises(TypeError, match=r"scheduler must be .*, got "):
        WUSLR(Model(), scheduler)


@pytest.mark.parametrize(("lr_drop", "error"), [(0, ValueError), (1, ValueError), ("x", TypeError)])
def test_bad_lr_drop_is_refused(lr_drop, error):
    with pytest.raises(error, match="lr_drop"):
        make("WUSLR", lr_drop=lr_drop)


def test_a_scheduler_that_the_caller_steps_is_watched_only():
    """Rates as an epoch began with them; the same decisions as when the policy steps it."""
    for schedule in (factors(1, 1, 1, 0.1), factors(0.1, 0.1, 0.1, 1), factors(1, 1, 0.8, 0.5)):
        optimizer = make_optimizer(0.1)
        scheduler = schedule(optimizer)
        optimizer.step()
        policy = WUSLR(Model(), scheduler, step_scheduler=False, warmup=0, patience=1)
        decisions = []
        for accuracy in FLAT[:8]:
            scheduler.step()
            decisions.append(policy.step(accuracy))
        own = make("WUSLR", schedule(make_optimizer(0.1)), warmup=0, patience=1)
        assert decisions == [mark == "S" for mark in run_lr(own, FLAT[:8])]


def test_a_scheduler_of_batches():
    """OneCycleLR: weights train while the rate climbs and falls by more than half an epoch."""
    epochs, batches = 12, 10
    optimizer = make_optimizer(0.1)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * batches, pct_start=0.2)
    policy = WUSLR(Model(), scheduler, step_scheduler=False, warmup=0, patience=1)
    began, decisions = [], []
    for _ in range(epochs):
        began.append(optimizer.param_groups[0]["lr"])
        for _ in range(batches):
            optimizer.step()
            scheduler.step()
        decisions.append(policy.step(60.0))
    assert began[2] > 2 * began[1] > 4 * began[0]
    assert decisions[:3] == [False, False, True]
    assert scheduler.last_epoch == epochs * batches


def test_resuming_with_a_scheduler_that_the_caller_steps():
    def build():
        optimizer = make_optimizer(0.1)
        scheduler = lr_scheduler.StepLR(optimizer, 3, gamma=0.1)
        optimizer.step()
        return scheduler, WUSLR(Model(), scheduler, step_scheduler=False, warmup=0, patience=1)

    def step(scheduler, policy):
        scheduler.step()
        return policy.step(60.0)

    whole = build()
    decisions = [step(*whole) for _ in range(8)]
    for stop in range(8):
        first, second = build(), build()
        before = [step(*first) for _ in range(stop)]
        optimizers = [made[0].optimizer for made in (first, second)]
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for old, new in zip(first, second, strict=True):
            new.load_state_dict(copy.deepcopy(old.state_dict()))
        assert before + [step(*second) for _ in range(stop, 8)] == decisions


def test_a_metric_is_not_for_a_scheduler_that_the_caller_steps():
    scheduler = lr_scheduler.ReduceLROnPlateau(make_optimizer(0.1))
    policy = WUSLR(Model(), scheduler, step_scheduler=False)
    with pytest.raises(ValueError, match=r"metric is for scheduler\.step"):
        policy.step(60.0, metric=1.0)
    with pytest.raises(TypeError, match="step_scheduler must be a bool, got 1"):
        WUSLR(Model(), scheduler, step_scheduler=1)
