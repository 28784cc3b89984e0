"""Final windows, and windows in which nothing would train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wus_ext
from wus_ext.methods import policy as policy_module
from wus_ext.methods.policy import WUS
from wus_ext.methods.rules import Settings

from .stub import (
    FLAT,
    Model,
    factors,
    make,
    make_optimizer,
    marks,
    run_lr,
    through_a_file,
)

RISING = [10.0 * epoch for epoch in range(1, 9)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"final_window": 1}, "......S."),
        ({"final_window": 3}, "....SSS."),
        ({"final_window": 8}, "SSSSSSS."),
        ({"final_window": 0}, "........"),
    ],
)
def test_a_run_of_known_length_ends_in_a_window(options, expected):
    policy = WUS(Model(), total_epochs=8, **options)
    assert marks(policy.step(accuracy) for accuracy in RISING) == expected


def test_the_final_window_goes_before_every_other_rule():
    drops = factors(*(0.1**i for i in range(9)))
    settings = {"total_epochs": 8, "final_window": 3, "max_window": 1, "warmup": 9, "min_open": 9}
    policy = make("WUSLR", drops(make_optimizer(0.1)), **settings)
    assert run_lr(policy, FLAT[:7]) == "....SSS"


@pytest.mark.parametrize("method", ["WUS", "WUSLR"])
def test_finish_skips_from_now_on(method):
    policy = make(method, max_window=1)
    policy.step(10.0)
    policy.finish()
    assert policy.skipping is policy.model.skipping is True
    assert [policy.step(accuracy) for accuracy in RISING] == [True] * 8
    resumed = make(method, max_window=1)
    resumed.load_state_dict(through_a_file(policy.state_dict()))
    assert resumed.step(10.0) is True


def test_finish_within_a_window_goes_on_with_it():
    policy = WUS(Model(), warmup=0, patience=1, max_window=2)
    assert [policy.step(60.0) for _ in range(2)] == [False, True]
    policy.finish()
    assert [policy.step(60.0) for _ in range(4)] == [True] * 4


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"final_window": 1}, ValueError, "final_window needs total_epochs"),
        ({"final_window": -1, "total_epochs": 5}, ValueError, "final_window .*at least 0, got -1"),
        ({"total_epochs": 0}, ValueError, "total_epochs .*at least 1, got 0"),
        ({"total_epochs": 2.5}, TypeError, "total_epochs .*2.5"),
    ],
)
def test_bad_lengths_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        Settings(**options)


def test_a_run_may_get_longer():
    policy = WUS(Model(), total_epochs=8, final_window=1)
    policy.step(10.0)
    longer = WUS(Model(), total_epochs=12, final_window=1)
    longer.load_state_dict(policy.state_dict())
    assert marks(longer.step(accuracy) for accuracy in (20, 30, 40, 50, 60, 70, 80)) == "." * 7
    assert [longer.step(accuracy) for accuracy in (90, 95, 99)] == [False, False, True]


NO_BIAS = pytest.mark.filterwarnings("ignore:.*has no bias:UserWarning")


@pytest.fixture
def real(monkeypatch):
    for name in ("set_skip", "trains_nothing"):
        monkeypatch.setattr(policy_module, name, getattr(wus_ext.conversion.windows, name))


def no_bias():
    return nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False)
    )


@NO_BIAS
@pytest.mark.parametrize("opens", ["step", "finish"])
def test_a_window_that_trains_nothing_is_refused_where_it_opens(real, opens):
    model = wus_ext.convert(no_bias()[::2])
    policy = WUS(model, warmup=0, patience=1)
    policy.step(50.0)
    with pytest.raises(ValueError, match=r"nothing trains in a skip window.*layers="):
        policy.step(50.0) if opens == "step" else policy.finish()
    assert not policy.skipping
    assert not wus_ext.is_skipping(model)
    assert policy.history == [50.0]
    model(torch.randn(3, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@NO_BIAS
@pytest.mark.parametrize(
    "make_policy",
    [
        lambda: WUS(wus_ext.convert(no_bias()), warmup=0, patience=1),  # the shift of batch norm
        lambda: WUS(wus_ext.convert(no_bias()[::2]), layers="0", warmup=0, patience=1),
        lambda: WUS(wus_ext.convert(no_bias(), skip_gamma=False), warmup=0, patience=1),
    ],
    ids=["shift", "some layers", "gamma"],
)
def test_a_window_in_which_something_trains_opens(real, make_policy):
    policy = make_policy()
    assert [policy.step(50.0) for _ in range(2)] == [False, True]


def test_frozen_biases_count_as_nothing(real):
    model = wus_ext.convert(nn.Linear(4, 2))
    model.bias.requires_grad_(False)
    policy = WUS(model, warmup=0, patience=1)
    policy.step(50.0)
    with pytest.raises(ValueError, match="nothing trains"):
        policy.step(50.0)
