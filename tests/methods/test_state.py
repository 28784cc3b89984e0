"""State dicts: resuming anywhere decides the same, and a bad state is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wus_ext.methods.policy import WUS, WUSLR

from .stub import (
    ACCURACIES,
    FLAT,
    OPTIONS,
    SCHEDULERS,
    Model,
    make,
    make_optimizer,
    snapshot,
    through_a_file,
)


@settings(max_examples=60, deadline=None)
@given(OPTIONS, ACCURACIES)
def test_resuming_anywhere_decides_the_same(options, accuracies):
    whole = WUS(Model(), **options)
    decisions, states = [], [whole.state_dict()]
    for accuracy in accuracies:
        decisions.append(whole.step(accuracy))
        states.append(whole.state_dict())
    for stop, state in enumerate(states):
        resumed = WUS(Model(), **options)
        resumed.load_state_dict(through_a_file(state))
        assert resumed.state_dict() == state
        assert resumed.skipping is resumed.model.skipping is ([False, *decisions][stop])
        assert [resumed.step(accuracy) for accuracy in accuracies[stop:]] == decisions[stop:]
        assert resumed.state_dict() == states[-1]


# LambdaLR does not save its function and warns about it: every scheduler here restores itself.
RESUMABLE = [name for name in SCHEDULERS if name != "constant"]


@settings(max_examples=40, deadline=None)
@given(OPTIONS, ACCURACIES, st.sampled_from(RESUMABLE), st.permutations(range(3)))
def test_resuming_anywhere_with_a_scheduler_decides_the_same(options, accuracies, name, order):
    def build():
        optimizer = make_optimizer(0.1, 0.02)
        return optimizer, WUSLR(Model(), SCHEDULERS[name](optimizer), **options)

    def step(optimizer, policy, accuracy):
        optimizer.step()
        return policy.step(accuracy), [group["lr"] for group in optimizer.param_groups]

    def parts(optimizer, policy):
        return [optimizer, policy.scheduler, policy]

    whole = build()
    record = []
    saved = [[copy.deepcopy(part.state_dict()) for part in parts(*whole)]]
    for accuracy in accuracies:
        record.append(step(*whole, accuracy))
        saved.append([copy.deepcopy(part.state_dict()) for part in parts(*whole)])
    for stop, states in enumerate(saved):
        resumed = build()
        for i in order:
            state = through_a_file(states[i]) if i == 2 else copy.deepcopy(states[i])
            parts(*resumed)[i].load_state_dict(state)
        assert [step(*resumed, accuracy) for accuracy in accuracies[stop:]] == record[stop:]
        assert resumed[1].state_dict() == whole[1].state_dict()


def test_loading_an_older_state_goes_back():
    policy = WUS(Model(), warmup=0)
    start = policy.state_dict()
    for accuracy in FLAT[:4]:
        policy.step(accuracy)
    assert policy.model.skipping
    policy.load_state_dict(start)
    assert not policy.skipping
    assert not policy.model.skipping
    assert policy.history == []


def edited(**changes):
    return lambda state: {**state, **changes}


BAD_STATES = {
    "not a mapping": (lambda state: [state], TypeError, "mapping, got list"),
    "empty": (lambda state: {}, ValueError, r"keys .*got \[\]"),
    "key missing": (lambda state: {"history": []}, ValueError, r"got \['history'\]"),
    "key unknown": (edited(extra=1), ValueError, "extra"),
    "other settings": (
        lambda state: {**state, "settings": {**state["settings"], "max_window": 7}},
        ValueError,
        "saved with settings .*'max_window': 7",
    ),
    "accuracy out of range": (edited(history=[120.0]), ValueError, "accuracy .*120"),
    "accuracy not a number": (edited(history=["x"]), TypeError, "accuracy .*'x'"),
    "skipping not a bool": (edited(skipping=1), ValueError, "'skipping'"),
    "epochs negative": (edited(epochs=-1), ValueError, "'epochs' .*-1"),
    "epochs beyond the history": (edited(epochs=99), ValueError, "'epochs' .*99"),
    "epochs not a number": (edited(epochs=None), ValueError, "'epochs' .*None"),
}


@pytest.mark.parametrize(("edit", "error", "text"), BAD_STATES.values(), ids=BAD_STATES.keys())
@pytest.mark.parametrize("method", ["WUS", "WUSLR"])
def test_bad_state_is_refused_and_changes_nothing(method, edit, error, text):
    policy = make(method, warmup=0)
    for accuracy in FLAT[:4]:
        policy.step(accuracy)
    before = snapshot(policy)
    with pytest.raises(error, match=text):
        policy.load_state_dict(edit(policy.state_dict()))
    assert snapshot(policy) == before


@pytest.mark.parametrize(("saved", "loaded"), [("WUS", "WUSLR"), ("WUSLR", "WUS")])
def test_state_of_the_other_policy_is_refused(saved, loaded):
    with pytest.raises(ValueError, match=f"saved by a {loaded}"):
        make(loaded).load_state_dict(make(saved).state_dict())


def test_state_with_another_lr_drop_is_refused():
    with pytest.raises(ValueError, match=r"'lr_drop': 0\.1"):
        make("WUSLR").load_state_dict(make("WUSLR", lr_drop=0.1).state_dict())


def test_numpy_settings_give_a_plain_state():
    policy = WUS(Model(), threshold=np.float32(1), patience=np.int64(2))
    assert through_a_file(policy.state_dict()) == WUS(Model()).state_dict()
