"""When windows open and close, and which layers they switch."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings

import wus_ext
from wus_ext.methods import policy as policy_module
from wus_ext.methods.policy import WUS, WUSLR
from wus_ext.methods.rules import Phase, Settings, decide

from .stub import ACCURACIES, FLAT, OPTIONS, Model, constant, marks

CADENCE = {
    "rising accuracy never skips": (
        {"warmup": 0},
        [10, 20, 30, 40, 50, 60, 70, 80],
        "........",
    ),
    "flat accuracy with the defaults: warm-up, then windows of 3, one epoch between": (
        {},
        FLAT,
        "....SSS.SSS.SSS.",
    ),
    "no window before patience + 1 epochs": ({"warmup": 0, "patience": 4}, FLAT[:7], "....SSS"),
    "warm-up 0, patience 1": ({"warmup": 0, "patience": 1}, FLAT[:6], ".SSS.S"),
    "warm-up longer than patience": ({"warmup": 7, "patience": 1}, FLAT[:9], "......SSS"),
    "warm-up accuracies count": (
        {"warmup": 4, "patience": 2},
        [10, 60, 60, 60],
        "...S",
    ),
    "windows of 1": ({"warmup": 0, "patience": 1, "max_window": 1}, FLAT[:7], ".S.S.S."),
    "windows of 5": ({"warmup": 0, "patience": 1, "max_window": 5}, FLAT[:9], ".SSSSS.SS"),
    "min_open 3": (
        {"warmup": 0, "patience": 1, "max_window": 2, "min_open": 3},
        FLAT[:11],
        "..SS...SS..",
    ),
    "variation at the threshold is not flat": (
        {"warmup": 0, "patience": 1, "threshold": 1.0},
        [50, 51, 50, 49, 50],
        ".....",
    ),
    "variation just below the threshold is flat": (
        {"warmup": 0, "patience": 1, "threshold": 1.0},
        [50, 50.75, 50, 49.25],
        ".SSS",
    ),
    "variation is the range, not the last difference": (
        {"warmup": 0, "patience": 2, "threshold": 1.0},
        [50, 50.75, 51.5, 52.25, 53],
        ".....",
    ),
    "a fall is variation, too": ({"warmup": 0, "patience": 1}, [60, 60, 50, 50], ".S.S"),
    "early close on growing variation; it stays in view for patience epochs": (
        {"warmup": 0, "patience": 2},
        [60, 60, 60, 60, 65, 65, 65, 65],
        "..SS..SS",
    ),
    "early close in the first epoch of a window": (
        {"warmup": 0, "patience": 1},
        [60, 60, 65, 65, 65],
        ".S.SS",
    ),
    "early close, then min_open epochs though flat again": (
        {"warmup": 0, "patience": 1, "min_open": 3},
        [60, 60, 60, 65, 65, 65, 65, 65],
        "..S...SS",
    ),
    "no early close at max_window's end reopens at once": (
        {"warmup": 0, "patience": 1, "max_window": 2},
        [60, 60, 60, 60, 60, 60],
        ".SS.SS",
    ),
    "an open epoch that helps keeps weights training": (
        {"warmup": 0, "patience": 1, "max_window": 2},
        [60, 60, 60, 60, 64, 66, 66.5, 66.5],
        ".SS...SS",
    ),
    "threshold 0 never opens": ({"warmup": 0, "patience": 1, "threshold": 0}, FLAT, "." * 16),
    "threshold 100 opens always": (
        {"warmup": 0, "patience": 1, "threshold": 100, "max_window": 2},
        [0, 90, 5, 70, 10],
        ".SS.S",
    ),
    "0 and 100 are accuracies": (
        {"warmup": 0, "patience": 1},
        [100, 100, 0, 100],
        ".S..",
    ),
}


@pytest.mark.parametrize(
    ("options", "accuracies", "expected"), CADENCE.values(), ids=CADENCE.keys()
)
def test_cadence(options, accuracies, expected):
    model = Model()
    policy = WUS(model, **options)
    decisions = []
    for accuracy in accuracies:
        decisions.append(policy.step(accuracy))
        assert policy.skipping is decisions[-1] is model.skipping
    assert marks(decisions) == expected
    assert policy.history == accuracies
    assert model.switched == [False, *decisions]


def test_switches_a_real_model(monkeypatch):
    monkeypatch.setattr(policy_module, "set_skip", wus_ext.set_skip)
    model = wus_ext.convert(torch.nn.Linear(4, 2))
    policy = WUS(model, warmup=0, patience=1, max_window=1)
    for skip in (False, True, False, True):
        assert policy.step(60.0) is skip
        assert wus_ext.is_skipping(model) is skip
    state = policy.state_dict()
    resumed = WUS(model, warmup=0, patience=1, max_window=1)
    assert not wus_ext.is_skipping(model)
    resumed.load_state_dict(state)
    assert wus_ext.is_skipping(model)


LAYERS = {
    "a pattern": lambda: "0",
    "several, once": lambda: iter(["0"]),
    "a predicate": lambda: lambda name, module: name == "0",
}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("method", [WUS, WUSLR])
def test_switches_only_the_layers_it_is_told_to(monkeypatch, method, layers):
    monkeypatch.setattr(policy_module, "set_skip", wus_ext.set_skip)
    model = wus_ext.convert(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = constant(optimizer)
    optimizer.step()  # stands for an epoch
    given = (model,) if method is WUS else (model, schedule)

    def make():
        return method(*given, layers=layers(), warmup=0, patience=1, max_window=1)

    def flags():
        return [part.skip_wgrad for part in model]

    wus_ext.set_skip(model, True, layers="2")
    policy = make()
    assert flags() == [False, False, True]
    for skip in (False, True, False, True):
        assert policy.step(60.0) is skip
        assert flags() == [skip, False, True]
    state = policy.state_dict()
    resumed = make()
    assert flags() == [False, False, True]
    resumed.load_state_dict(state)
    assert flags() == [True, False, True]


BAD_LAYERS = {
    "no match": ("conv", ValueError, "no module's name matches 'conv'; there are 0"),
    "one of two": (["0", "conv"], ValueError, "no module's name matches 'conv'"),
    "none": ([], ValueError, "layers: no pattern; None means every layer"),
    "a number": (3, TypeError, "layers: expected a name pattern"),
}


@pytest.mark.parametrize(("layers", "error", "text"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_bad_layers_are_refused_at_once(monkeypatch, layers, error, text):
    monkeypatch.setattr(policy_module, "set_skip", wus_ext.set_skip)
    with pytest.raises(error, match=text):
        WUS(wus_ext.convert(torch.nn.Sequential(torch.nn.Linear(4, 2))), layers=layers)


def test_an_unconverted_model_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(policy_module, "set_skip", wus_ext.set_skip)
    with pytest.raises(ValueError, match="convert"):
        WUS(torch.nn.Linear(4, 2))


def test_starts_with_weights_training():
    model = Model()
    model.switched.append(True)
    policy = WUS(model)
    assert not policy.skipping
    assert not model.skipping
    assert policy.history == []


@settings(max_examples=300, deadline=None)
@given(OPTIONS, ACCURACIES)
def test_decisions_follow_the_documented_rules(options, accuracies):
    """The rules said once more, over the whole run at once and without any state."""
    policy = WUS(Model(), **options)
    # ran[e]: did epoch e skip; the decision after epoch e is ran[e + 1]
    ran = [False] + [policy.step(accuracy) for accuracy in accuracies]
    patience = options["patience"]
    for epoch in range(len(accuracies)):
        done = epoch + 1
        recent = accuracies[max(0, done - patience - 1) : done]
        flat = len(recent) == patience + 1 and max(recent) - min(recent) < options["threshold"]
        if ran[epoch]:
            whole_window = all(ran[max(0, done - options["max_window"]) : done])
            expected = flat and not whole_window
        else:
            trained = not any(ran[max(0, done - options["min_open"]) : done])
            enough = done >= max(options["warmup"], options["min_open"])
            expected = flat and trained and enough
        assert ran[epoch + 1] is expected


def test_decide_is_pure():
    history, phase, rules = [60.0] * 5, Phase(skipping=True, epochs=2), Settings()
    before = (list(history), phase, copy.copy(rules))
    assert decide(history, phase, rules) is decide(history, phase, rules) is True
    assert decide(history, phase, rules, lr_jumped=True) is False
    assert (history, phase, rules) == before
