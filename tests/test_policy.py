"""When to skip: cadence step by step, resuming anywhere, and bad input."""

from __future__ import annotations

import copy
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

import wus_ext
from wus_ext import policy as policy_module
from wus_ext.policy import WUS, WUSLR, Phase, Settings, decide


class Model:
    """Stands for a converted model: remembers how it was switched."""

    def __init__(self):
        self.switched = []

    @property
    def skipping(self):
        return self.switched[-1]


@pytest.fixture(autouse=True, scope="module")
def stub_switch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "set_skip", lambda model, on, **_: model.switched.append(on))
        yield


def marks(decisions):
    """Decisions as text: the n-th mark is what the policy said after epoch n."""
    return "".join("S" if skip else "." for skip in decisions)


# --- cadence -------------------------------------------------------------------------------------

FLAT = [60.0] * 16
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
    assert decide(history, phase, rules, lr_dropped=True) is False
    assert (history, phase, rules) == before


# --- accuracies and settings ---------------------------------------------------------------------


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
        "WUS(threshold=2.0, patience=2, max_window=3, warmup=5, min_open=1)"
    )
    assert repr(make("WUSLR")).endswith("min_open=1, lr_drop=0.5)")


# --- learning rates ------------------------------------------------------------------------------


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
    "a rise is no drop": (factors(0.1, 0.1, 0.2, 1, 1), {}, ".SSS.SSS"),
    "a drop below the opening rate counts, one from a peak within the window does not": (
        factors(0.5, 0.5, 1, 1, 0.5),
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


# --- resuming ------------------------------------------------------------------------------------


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


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
