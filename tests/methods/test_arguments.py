"""Accuracies and settings: what is taken, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from wus_ext.methods import policy as policy_module
from wus_ext.methods.policy import WUS

from .stub import Model, make, snapshot


@pytest.mark.parametrize(
    "accuracy",
    [
        60,
        60.0,
        np.float64(60),
        np.float32(60),
        np.int64(60),
        torch.tensor(60),
        torch.tensor(60.0),
        torch.tensor(60.0, dtype=torch.bfloat16),
        torch.tensor(60.0, requires_grad=True),
    ],
    ids=lambda a: f"{type(a).__name__}-{getattr(a, 'dtype', '')}",
)
def test_accuracy_is_stored_as_a_float(accuracy):
    policy = WUS(Model())
    policy.step(accuracy)
    assert policy.history == [60.0]
    assert type(policy.history[0]) is float


BAD_ACCURACY = {
    "nan": (math.nan, ValueError, "finite"),
    "nan tensor": (torch.tensor(math.nan), ValueError, "finite"),
    "inf": (math.inf, ValueError, "finite"),
    "negative": (-0.5, ValueError, r"\[0, 100\], got -0.5"),
    "above 100": (100.5, ValueError, r"\[0, 100\], got 100.5"),
    "above 100 tensor": (torch.tensor(101), ValueError, r"\[0, 100\], got 101"),
    "none": (None, TypeError, "got None"),
    "text": ("60", TypeError, "got '60'"),
    "bool": (True, TypeError, "got True"),
    "bool tensor": (torch.tensor(True), TypeError, "got True"),
    "complex": (60 + 0j, TypeError, "got "),
    "list": ([60.0], TypeError, "got "),
    "1-dim tensor": (torch.tensor([60.0]), TypeError, r"shape \(1,\)"),
}


@pytest.mark.parametrize(
    ("accuracy", "error", "text"), BAD_ACCURACY.values(), ids=BAD_ACCURACY.keys()
)
@pytest.mark.parametrize("method", ["WUS", "WUSLR"])
def test_bad_accuracy_is_refused_and_changes_nothing(method, accuracy, error, text):
    policy = make(method, warmup=0, patience=1)
    for _ in range(3):
        policy.step(60.0)
    before = snapshot(policy)
    with pytest.raises(error, match=f"accuracy .*{text}"):
        policy.step(accuracy)
    assert snapshot(policy) == before


BAD_SETTINGS = {
    "negative threshold": ({"threshold": -1.0}, ValueError, "threshold .*-1"),
    "threshold above 100": ({"threshold": 101}, ValueError, "threshold .*101"),
    "nan threshold": ({"threshold": math.nan}, ValueError, "threshold .*nan"),
    "text threshold": ({"threshold": "1"}, TypeError, "threshold .*'1'"),
    "bool threshold": ({"threshold": True}, TypeError, "threshold .*True"),
    "patience 0": ({"patience": 0}, ValueError, "patience .*at least 1, got 0"),
    "patience 1.5": ({"patience": 1.5}, TypeError, "patience .*1.5"),
    "max_window 0": ({"max_window": 0}, ValueError, "max_window .*at least 1, got 0"),
    "max_window inf": ({"max_window": math.inf}, TypeError, "max_window .*inf"),
    "max_window bool": ({"max_window": True}, TypeError, "max_window .*True"),
    "warmup -1": ({"warmup": -1}, ValueError, "warmup .*at least 0, got -1"),
    "warmup none": ({"warmup": None}, TypeError, "warmup .*None"),
    "min_open 0": ({"min_open": 0}, ValueError, "min_open .*at least 1, got 0"),
}


@pytest.mark.parametrize(
    ("options", "error", "text"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys()
)
@pytest.mark.parametrize("method", ["WUS", "WUSLR"])
def test_bad_settings_are_refused(method, options, error, text):
    with pytest.raises(error, match=text):
        make(method, **options)


def test_settings_are_keywords_only():
    with pytest.raises(TypeError):
        WUS(Model(), 1.0)


def test_fractions_instead_of_percent_warn():
    policy = WUS(Model(), warmup=0)
    policy.step(0.5)
    policy.step(0.6)
    with pytest.warns(UserWarning, match="percentages"):
        policy.step(0.61)


def test_history_is_a_copy():
    policy = WUS(Model())
    policy.step(50.0)
    policy.history.append(1.0)
    policy.state_dict()["history"].append(1.0)
    assert policy.history == [50.0]


def test_a_switch_that_fails_leaves_the_policy_as_it_was(monkeypatch):
    policy = WUS(Model())
    policy.step(50.0)
    before = policy.state_dict()

    def fail(model, on, layers):
        raise RuntimeError("no")

    monkeypatch.setattr(policy_module, "set_skip", fail)
    with pytest.raises(RuntimeError):
        policy.step(51.0)
    with pytest.raises(RuntimeError):
        policy.load_state_dict({**before, "history": [1.0], "skipping": True})
    assert policy.state_dict() == before


def test_repr_names_the_settings():
    assert repr(WUS(Model(), threshold=2)) == (
        "WUS(threshold=2.0, patience=2, max_window=3, warmup=5, min_open=1, "
        "final_window=0, total_epochs=None)"
    )
    assert repr(make("WUSLR")).endswith("total_epochs=None, lr_drop=0.5)")
