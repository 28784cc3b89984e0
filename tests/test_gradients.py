"""Products of large linear layers in fused steps, and the memory of their weights' gradients."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import wus_ext
from tests.program.chains import check
from wus_ext import gradients, products


@pytest.fixture
def small_is_large(monkeypatch):
    monkeypatch.setattr(gradients, "LARGE_BYTES", 1)


def build(*, skip=False, **settings):
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(600, 700), nn.ReLU(), nn.Linear(700, 520))
    fused = wus_ext.convert(copy.deepcopy(stock), full="fused", **settings)
    wus_ext.set_skip(fused, skip)
    if skip:
        for layer in stock[::2]:
            layer.weight.requires_grad_(False)
    return stock, fused


def backward(model, seed=0):
    x = torch.randn(48, 600, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()


def grads(model):
    return [parameter.grad for parameter in model.parameters()]


def addresses(model):
    return [layer.weight.grad.data_ptr() for layer in model[::2]]


@pytest.fixture
def block_calls(monkeypatch):
    """The batches that products in blocks of the weight were made for."""
    calls = []

    class Counted:
        def __getattr__(self, name):
            if name.startswith("linear_"):
                return lambda x, *rest: (
                    calls.append(len(x)) or getattr(torch.ops.wus, name)(x, *rest)
                )
            return getattr(torch.ops.wus, name)

    monkeypatch.setattr(products, "ops", Counted())
    return calls


@pytest.mark.parametrize(
    ("skip", "settings", "batch", "products_in_blocks"),
    [
        (False, {}, 48, 4),
        (False, {}, 31, 0),
        (False, {}, 600, 0),
        (True, {"memory_budget": 0}, 48, 4),
        (True, {}, 48, 0),
    ],
    ids=["full", "few rows", "many rows", "skip, nothing packed", "skip, packed"],
)
def test_a_large_layer_equals_stock(block_calls, skip, settings, batch, products_in_blocks):
    if wus_ext.build_info()["cpu_capability"] == "generic":
        products_in_blocks = 0
    stock, fused = build(skip=skip, **settings)
    check(stock, fused, x := torch.randn(batch, 600), tolerance=2e-5)
    assert block_calls[:4] == [len(x)] * products_in_blocks


def test_a_weight_with_other_strides_takes_torchs_products(block_calls):
    stock, fused = build()
    for model in (stock, fused):
        model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    check(stock, fused, torch.randn(48, 600), tolerance=2e-5)
    assert fused[0].weight.grad.stride() == fused[0].weight.stride()
    assert len(block_calls) == 2


@pytest.mark.usefixtures("small_is_large")
class TestMemory:
    def test_the_next_step_takes_it(self):
        stock, fused = build()
        backward(fused)
        first = addresses(fused)
        assert first[0] != first[1]
        for seed in (1, 2):
            fused.zero_grad()
            stock.zero_grad()
            backward(fused, seed)
            backward(stock, seed)
            assert addresses(fused) == first
            torch.testing.assert_close(grads(fused), grads(stock))

    @pytest.mark.parametrize(
        "hold",
        [
            lambda grad: grad,
            lambda grad: grad.detach(),
            lambda grad: grad.view(-1)[3:9],
            lambda grad: grad.numpy(),
        ],
        ids=["itself", "detached", "a part", "numpy"],
    )
    def test_what_somebody_holds_stays(self, hold):
        _, fused = build()
        backward(fused)
        held = hold(fused[0].weight.grad)
        before = torch.as_tensor(held).clone()
        first = addresses(fused)
        fused.zero_grad()
        backward(fused, 1)
        assert torch.equal(torch.as_tensor(held), before)
        assert addresses(fused)[0] != first[0]
        assert addresses(fused)[1] == first[1]

    @pytest.mark.parametrize("to_none", [False, True])
    def test_gradients_add_up(self, to_none):
        stock, fused = build()
        for model in (stock, fused):
            for seed in range(4):
                if seed == 2:
                    model.zero_grad(set_to_none=to_none)
                backward(model, seed)
        torch.testing.assert_close(grads(fused), grads(stock))

    def test_a_layer_that_is_called_twice(self):
        torch.manual_seed(0)
        layer = nn.Linear(600, 600)
        stock = nn.Sequential(layer, nn.ReLU(), layer)
        fused = wus_ext.convert(copy.deepcopy(stock), full="fused")
        for _ in range(2):
            for model in (stock, fused):
                model.zero_grad()
                backward(model)
            torch.testing.assert_close(grads(fused), grads(stock))

    def test_a_window_gives_it_back(self):
        _, fused = build()
        backward(fused)
        assert all(layer in gradients._kept for layer in fused[::2])
        wus_ext.set_skip(fused, True)
        fused(torch.randn(2, 600))
        assert not any(layer in gradients._kept for layer in fused[::2])

    def test_it_goes_with_its_layer(self):
        _, fused = build()
        backward(fused)
        kept = [weakref.ref(gradients._kept[layer]) for layer in fused[::2]]
        del fused
        gc.collect()
        assert [ref() for ref in kept] == [None, None]

    def test_another_weight_gets_other_memory(self):
        _, fused = build()
        backward(fused)
        fused[2] = nn.Linear(700, 300)
        wus_ext.convert(fused, full="fused")
        fused.zero_grad()
        backward(fused)
        assert fused[2].weight.grad.shape == (300, 700)


def test_small_gradients_are_not_kept():
    _, fused = build()
    backward(fused)
    assert not any(layer in gradients._kept for layer in fused[::2])
