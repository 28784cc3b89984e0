"""Products of large linear layers in fused steps, and the memory of their weights' gradients."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import wus_ext
from tests.engine.chains import check
from wus_ext.engine import gradient_memory as gradients
from wus_ext.engine import linear as products

GENERIC = wus_ext.build_info()["cpu_capability"] == "generic"


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


def kept_addresses(model):
    return [gradients._kept[layer].address for layer in model[::2] if layer in gradients._kept]


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
        (True, {"memory_budget": None}, 48, 0),
        (True, {}, 48, 2),
    ],
    ids=["full", "few rows", "many rows", "skip, nothing packed", "skip, packed", "skip, half"],
)
def test_a_large_layer_equals_stock(block_calls, skip, settings, batch, products_in_blocks):
    products_in_blocks = 0 if GENERIC else products_in_blocks
    stock, fused = build(skip=skip, **settings)
    check(stock, fused, x := torch.randn(batch, 600), tolerance=2e-5)
    assert block_calls[:4] == [len(x)] * products_in_blocks


def test_a_weight_with_other_strides_takes_torchs_products(block_calls):
    stock, fused = build()
    for model in (stock, fused):
        model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    check(stock, fused, torch.randn(48, 600), tolerance=2e-5)
    assert fused[0].weight.grad.stride() == fused[0].weight.stride()
    assert len(block_calls) == (0 if GENERIC else 2)


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
            assert addresses(fused) == first == kept_addresses(fused)
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

    @pytest.mark.parametrize(
        "end",
        [
            lambda fused: wus_ext.set_skip(fused, True),
            lambda fused: wus_ext.skip_weight_updates(fused).__enter__(),
            wus_ext.revert,
        ],
        ids=["window", "block", "revert"],
    )
    def test_it_is_given_back(self, end):
        _, fused = build()
        backward(fused)
        assert len(kept_addresses(fused)) == 2
        end(fused)
        assert not kept_addresses(fused)

    def test_layers_that_train_on_keep_theirs(self):
        _, fused = build()
        backward(fused)
        wus_ext.set_skip(fused, True, layers="0")
        assert kept_addresses(fused) == [fused[2].weight.grad.data_ptr()]

    def test_it_goes_with_its_layer(self):
        _, fused = build()
        backward(fused)
        kept = [weakref.ref(gradients._kept[layer].memory) for layer in fused[::2]]
        del fused
        gc.collect()
        assert [ref() for ref in kept] == [None, None]

    @pytest.mark.parametrize(
        "weight",
        [torch.randn(300, 700), torch.randn(520, 700, dtype=torch.double)],
        ids=["shape", "dtype"],
    )
    def test_another_weight_gets_other_memory(self, weight):
        _, fused = build()
        backward(fused)
        address = gradients._kept[fused[2]].address
        grad = torch.randn(48, len(weight), dtype=weight.dtype)
        memory = gradients.gradient_memory(fused[2], grad, tuple(weight.shape))
        assert memory.shape == weight.shape
        assert memory.dtype == weight.dtype
        assert memory.data_ptr() != address

    def test_shared_memory_is_left_to_whom_it_is_shared_with(self):
        _, fused = build()
        backward(fused)
        fused[0].weight.grad.share_memory_()
        shared = addresses(fused)[0]
        fused.zero_grad()
        backward(fused, 1)
        assert addresses(fused)[0] != shared
        assert not fused[0].weight.grad.is_shared()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_parameters_of_another_model(self, dtype):
        stock, _ = build()
        parameters = {name: p.detach().to(dtype) for name, p in stock.named_parameters()}
        parameters = {name: nn.Parameter(p) for name, p in parameters.items()}
        skeleton = wus_ext.convert(build()[0].to("meta"), full="fused")
        x = torch.randn(48, 600, dtype=dtype)
        outputs = [torch.func.functional_call(model, parameters, x) for model in (stock, skeleton)]
        expected, actual = (
            torch.autograd.grad(output.square().mean(), list(parameters.values()))
            for output in outputs
        )
        torch.testing.assert_close(actual, expected)

    def test_a_batch_of_gradients(self):
        stock, fused = build()
        x = torch.randn(48, 600)
        results = []
        for model in (stock, fused):
            output, parameters = model(x), [*model.parameters()]
            grads = torch.randn(3, *output.shape, generator=torch.Generator().manual_seed(0))
            results.append(torch.autograd.grad(output, parameters, grads, is_grads_batched=True))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_small_gradients_are_not_kept():
    _, fused = build()
    backward(fused)
    assert not kept_addresses(fused)
