"""algo="measure": the fastest by trying, and the same again wherever the choices are handed on."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import wus_ext
from wus_ext.engine.conv import measure
from wus_ext.training import ConfigError

from ..training import tiny
from .chains import relative_error

KINDS = {
    "3x3": lambda: nn.Conv2d(16, 16, 3, padding=1),
    "stride 2": lambda: nn.Conv2d(16, 16, 3, 2, 1),
    "1x1": lambda: nn.Conv2d(16, 16, 1),
    "depthwise": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16),
}
NAMES = {
    "3x3": {"Winograd F4", "Winograd F2", "oneDNN"},
    "stride 2": {"strided", "oneDNN"},
    "1x1": {"1x1", "oneDNN"},
    "depthwise": {"depthwise", "oneDNN"},
}


def image():
    torch.manual_seed(1)
    return torch.randn(2, 16, 12, 12).contiguous(memory_format=torch.channels_last)


def run(model, x, grad_output=None):
    """The output, all gradients, and the gradient that they are of."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    output = model(x)
    if grad_output is None:
        torch.manual_seed(2)
        grad_output = torch.randn_like(output)
    output.backward(grad_output)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.detach(), {"input": x.grad, **gradients}, grad_output


def network(kind="3x3"):
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind](), nn.BatchNorm2d(16), nn.ReLU())
    return model.to(memory_format=torch.channels_last)


@pytest.fixture
def fastest(monkeypatch):
    """Makes a name the fastest wherever it is a candidate; lists what was compared."""
    compared = []

    def make(name):
        def choose(call, candidates, weight):
            compared.append((call, set(candidates)))
            return name if name in candidates else next(iter(candidates))

        monkeypatch.setattr(measure, "fastest", choose)
        return compared

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("last", [False, True], ids=["first", "oneDNN"])
def test_whatever_is_chosen_is_right(fastest, kind, skip, last):
    compared = fastest("oneDNN" if last else "")
    stock = network(kind)
    model = wus_ext.convert(copy.deepcopy(stock), algo="measure", full="fused")
    wus_ext.set_skip(model, skip)
    expected, wanted, grad_output = run(stock, image())
    for _ in range(2):
        output, got, _ = run(model, image(), grad_output)
        assert relative_error(output, expected) < 1e-4
        for name, gradient in got.items():
            if gradient is not None and name != "0.bias":  # which batch norm makes zero
                assert relative_error(gradient, wanted[name]) < 1e-4, name
    ((call, names),) = compared
    assert names == NAMES[kind]
    chosen = wus_ext.measured(model)[str(call)]
    assert (chosen == "oneDNN") == last


def test_the_clock_decides(monkeypatch):
    slow = {"oneDNN": 5, "Winograd F2": 1, "Winograd F4": 3}
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    class Fake:
        def __init__(self, name):
            self.name = name

        def forward(self, *_):
            clock[0] += slow[self.name]

        backward = forward

    model = network()
    call = measure.Call(
        measure.Geometry.of(model[0], (16, 16, 3, 3), (2, 16, 12, 12)), 2, False, True
    )
    candidates = {name: Fake(name) for name in slow}
    assert measure.fastest(call, candidates, None) == "Winograd F2"


def test_each_kind_of_call_is_measured_once(fastest):
    compared = fastest("Winograd F2")
    model = wus_ext.convert(network(), algo="measure", full="fused")
    for skip in (True, False, True, False):
        wus_ext.set_skip(model, skip)
        run(model, image())
    assert [call.trains for call, _ in compared] == [False, True]
    run(model, image()[:1])
    assert len(compared) == 3
    assert len(wus_ext.measured(model)) == 3


@pytest.mark.parametrize("copied", [
    copy.deepcopy,
    lambda model: pickle.loads(pickle.dumps(model)),
    lambda model: wus_ext.convert(
        network(), full="fused", algo=json.loads(json.dumps(wus_ext.measured(model)))),
], ids=["deepcopy", "pickle", "json"])  # fmt: skip
def test_choices_are_handed_on(fastest, copied):
    compared = fastest("Winograd F2")
    model = wus_ext.convert(network(), algo="measure", full="fused")
    output, gradients, grad_output = run(model, image())
    again = copied(model)
    again.load_state_dict(network().state_dict())
    fastest("oneDNN")
    output2, gradients2, _ = run(again, image(), grad_output)
    assert torch.equal(output, output2)
    for name, gradient in gradients.items():
        assert gradient is None or torch.equal(gradient, gradients2[name])
    assert len(compared) == 1


def test_measuring_leaves_random_numbers_and_gradients_alone():
    model = wus_ext.convert(network(), algo="measure", full="fused")
    x = image()
    state = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_lost_keeps_no_copy(fastest):
    fastest("oneDNN")
    model = wus_ext.convert(network(), algo="measure", memory_budget=None)
    wus_ext.set_skip(model, True)
    run(model, image())
    assert wus_ext.packed_bytes(model) == 0


def test_a_choice_that_the_budget_forbids_gives_way():
    choices = {}
    model = wus_ext.convert(network(), algo="measure", memory_budget=None)
    wus_ext.set_skip(model, True)
    run(model, image())
    choices = dict.fromkeys(wus_ext.measured(model), "Winograd F4")
    small = wus_ext.convert(network(), algo=choices, memory_budget=0)
    wus_ext.set_skip(small, True)
    run(small, image())
    assert wus_ext.packed_bytes(small) == 0


def test_errors():
    with pytest.raises(ValueError, match=r"algo: expected what wus_ext\.measured gives"):
        wus_ext.convert(network(), algo={"3x3": 4})
    with pytest.raises(ValueError, match="algo: 'fast' is not one of auto, measure"):
        wus_ext.convert(network(), algo="fast")
    assert wus_ext.measured(network()) == {}


def test_a_resumed_run_keeps_what_was_found(tmp_path, fastest):
    settings = {"algo": "measure", "full": "fused", "method": "fused"}
    fastest("Winograd F2")
    whole = tiny.trainer(**settings)
    whole.run()
    stopped = tiny.trainer(out=tmp_path, **settings)
    stopped.run_epoch()
    del stopped
    fastest("oneDNN")
    resumed = tiny.trainer(out=tmp_path, resume=True, **settings)
    resumed.run()
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("wus_ext.distributed.processes.count", lambda: 2)
    with pytest.raises(ConfigError, match="algo 'measure' needs a single process"):
        tiny.CONFIG.replace(algo="measure").validate()
