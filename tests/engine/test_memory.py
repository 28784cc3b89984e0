"""What steps hold: saved for backward, transformed weights and gradients, against stock's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wus_ext
from wus_ext.engine.engine import Engine

from .chains import Block, check, frozen, fused_chains, images, relative_error, saved_bytes


def network(channels=64):
    """Few pixels and many channels at its end, whose transformed weights would take the most."""
    layers = []
    for outputs in (channels // 4, channels // 2, channels):
        inputs = 3 if not layers else outputs // 2
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 4, 10))


def held(model, x):
    """Bytes at the end of a step's forward pass, and the gradients that its backward makes."""
    model.zero_grad()
    model(x).sum().backward()
    saved, output = saved_bytes(model, x)
    del output
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    packed = wus_ext.packed_bytes(model) if hasattr(model, "_skip_engine") else 0
    return saved + packed + gradients


@pytest.mark.parametrize("model", [network(), Block(16), network(128)], ids=["64", "block", "128"])
@pytest.mark.parametrize("batch", [8, 32, 128])
def test_a_skip_step_holds_no_more_than_stocks_full_step(model, batch):
    stock = copy.deepcopy(model).to(memory_format=torch.channels_last)
    skip = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(skip, True)
    x = images((batch, next(stock.parameters()).size(1), 16, 16)).requires_grad_()
    assert held(skip, x) <= held(stock, x)


@pytest.mark.parametrize("model", [network(), Block(16), network(128)], ids=["64", "block", "128"])
@pytest.mark.parametrize("batch", [32, 128])
@pytest.mark.parametrize("how", ["a window", "requires_grad=False"])
def test_a_step_for_the_input_s_gradient_holds_no_more_than_stock_s(model, batch, how):
    stock = copy.deepcopy(model).to(memory_format=torch.channels_last).requires_grad_(False)
    ours = copy.deepcopy(stock)
    if how == "a window":  # in which stock has no gradients to hold, either
        wus_ext.set_skip(wus_ext.convert(ours.requires_grad_(True)), True, skip_biases=True)
    else:
        wus_ext.convert(ours)
    x = images((batch, next(stock.parameters()).size(1), 16, 16)).requires_grad_()
    assert held(ours, x) <= held(stock, x)


def test_another_kind_of_window_drops_what_no_longer_fits():
    model = wus_ext.convert(network(128))
    x = images((32, 3, 16, 16)).requires_grad_()
    kept = []
    for inputs_only in (False, True):
        wus_ext.set_skip(model, True, skip_biases=inputs_only)
        for _ in range(2):
            model(x).sum().backward()
        kept.append(wus_ext.packed_bytes(model))
    fresh = wus_ext.convert(network(128))
    wus_ext.set_skip(fresh, True, skip_biases=True)
    for _ in range(2):
        fresh(x).sum().backward()
    assert kept[1] == wus_ext.packed_bytes(fresh) < kept[0]


@pytest.mark.parametrize("how", ["a window", "requires_grad=False"])
def test_linear_layers_without_a_gradient_are_counted_so(how):
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    if how == "a window":
        wus_ext.set_skip(wus_ext.convert(model), True, skip_biases=True)
    else:
        wus_ext.convert(model.requires_grad_(False))
    model(torch.randn(64, 512, requires_grad=True)).sum().backward()
    engine = model._skip_engine
    assert not engine.packed.fits(model[0], ("other",), lambda: model[0].weight.nbytes)


def test_without_a_budget_all_is_kept():
    x = images((8, 3, 16, 16))
    sizes = {}
    for budget in ("auto", None):
        skip = wus_ext.convert(network(128), memory_budget=budget)
        wus_ext.set_skip(skip, True)
        skip(x).sum().backward()
        sizes[budget] = wus_ext.packed_bytes(skip)
    assert sizes["auto"] < sizes[None]


@pytest.mark.parametrize("budget", ["auto", None, 0])
def test_what_is_not_kept_is_right_all_the_same(budget):
    torch.manual_seed(0)
    stock = network().to(memory_format=torch.channels_last)
    skip = wus_ext.convert(copy.deepcopy(stock), memory_budget=budget)
    wus_ext.set_skip(skip, True)
    check(frozen(stock), skip, images((8, 3, 16, 16)), tolerance=1e-4)


def test_one_image_is_evaluated_without_a_transform():
    torch.manual_seed(0)
    stock = network().eval()
    fused = wus_ext.convert(copy.deepcopy(stock), full="fused")
    x = images((1, 3, 16, 16))
    with torch.no_grad():
        assert relative_error(fused(x), stock(x)) < 1e-5
    assert wus_ext.packed_bytes(fused) == 0


def test_few_values_without_gradients_are_left_to_stock():
    torch.manual_seed(0)
    stock = network().eval()
    fused = wus_ext.convert(copy.deepcopy(stock), full="fused")
    few, many = images((2, 3, 16, 16)), images((1400, 3, 16, 16))
    with torch.no_grad():
        for x in (few, few, many, few):
            chains = fused_chains(fused, x)
            assert bool(chains) == (x is many)
            assert relative_error(fused(x), stock(x)) < 1e-5
    assert fused_chains(fused, few)  # with gradients


def test_evaluation_in_a_window_takes_what_training_made(monkeypatch):
    monkeypatch.setattr(Engine, "FEW_VALUES", 0)
    torch.manual_seed(0)
    skip = wus_ext.convert(network(), memory_budget=None, norm="frozen")
    wus_ext.set_skip(skip, True)
    x = images((8, 3, 16, 16))
    skip(x).sum().backward()
    made = {id(c.tensor) for own in skip._skip_engine.packed._layers.values() for c in own.values()}
    with torch.no_grad():
        skip.eval()(x)
    after = {id(c.tensor) for o in skip._skip_engine.packed._layers.values() for c in o.values()}
    assert after == made


def test_memory_for_one_use_is_given_back_when_stock_takes_over():
    model = wus_ext.convert(network(), algo="f4", memory_budget="auto")
    wus_ext.set_skip(model, True)
    x = images((2, 3, 16, 16))
    model(x).sum().backward()
    wus_ext.set_skip(model, False)
    assert wus_ext.packed_bytes(model) == 0


@pytest.mark.parametrize("batch", [2, 8, 32])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_windows_first_step_computes_what_later_ones_do(norm, batch):
    """What is chosen does not depend on what is kept by now: a resumed run starts with nothing."""
    torch.manual_seed(0)
    skip = wus_ext.convert(network(), norm=norm)
    wus_ext.set_skip(skip, True)
    x = images((batch, 3, 16, 16))
    results = []
    for _ in range(3):
        skip.zero_grad()
        output = skip(x)
        output.square().sum().backward()
        results.append(
            [output.detach(), *(p.grad for p in skip.parameters() if p.grad is not None)]
        )
    for later in results[1:]:
        for mine, first in zip(later, results[0], strict=True):
            assert torch.equal(mine, first)
