"""Linear layers whose ReLUs are cuBLASLt's: emulated with a stand-in for it, and on a real GPU."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import wus_ext
from wus_ext.engine import activation, autograd, options, support
from wus_ext.engine import linear as products
from wus_ext.engine.conv import algorithm as algorithms
from wus_ext.engine.conv import choice
from wus_ext.engine.gpu import linked

from .steps import check_replay, results

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Counted:
    """Operators that note which of them were called."""

    def __init__(self, ops):
        self._ops = ops
        self.calls = []

    def __getattr__(self, name):
        operator = getattr(self._ops, name)

        def call(*args, **options):
            self.calls.append(name)
            return operator(*args, **options)

        return call


@pytest.fixture
def lt(gpu, monkeypatch, tf32_products):
    counted = Counted(gpu.ops)
    monkeypatch.setattr(linked, "ops", counted)
    if gpu.device == "cpu":
        monkeypatch.setitem(support.TYPES, "cpu", FLOATS)
        for module in (activation, algorithms, autograd):
            monkeypatch.setattr(module, "ops", gpu.ops)
        for module in (choice, linked, products):
            monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
        monkeypatch.setattr(options, "build_info", lambda: {"cuda": "emulated"})
    counted.device = gpu.device
    return counted


def mlp(*features, dropout=False):
    layers = []
    for i, o in pairwise(features):
        layers += [nn.Linear(i, o), nn.ReLU(), *([nn.Dropout(0.5)] if dropout else [])]
    return nn.Sequential(*layers[: -2 if dropout else -1])


def twins(model, lt, dtype=torch.float32):
    """Two models in a skip window, the second with cuBLASLt's epilogues."""
    model = model.to(lt.device, dtype)
    models = [model, copy.deepcopy(model)]
    for model, names in zip(models, ((), ("cublaslt",)), strict=True):
        wus_ext.set_skip(wus_ext.convert(model, epilogues=names), True)
    return models


def compare(models, lt, features, dtype, autocast=None, samples=36):
    x = torch.randn(samples, features[0]).to(lt.device, dtype)
    g = torch.randn(samples, features[1]).to(lt.device, dtype)
    eps = torch.finfo(autocast or dtype).eps
    eps = max(eps, 1e-3) if lt.device == "cuda" else eps  # TF32 rounds where the other may not
    expected, actual = (results(model, x, g, autocast) for model in models)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert error <= 8 * eps, f"{error:.1e}"


FORWARD_AND_BACKWARD = ["linear_relu_aux", "linear_drelu_bgrad"]


def called(lt):
    return [name for name in lt.calls if name in FORWARD_AND_BACKWARD]


def need(lt):
    """Skips where this machine's cuBLASLt has no such product; the stand-in always has."""
    if lt.device == "cuda" and not called(lt):
        pytest.skip("this cuBLASLt has no such product")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_three_layers(lt, dtype):
    compare(twins(mlp(24, 136, 64, 8), lt, dtype), lt, (24, 8), dtype)
    need(lt)
    assert sorted(called(lt)) == sorted(FORWARD_AND_BACKWARD * 2)


def test_autocast(lt):
    models = twins(mlp(24, 136, 8), lt)
    compare(models, lt, (24, 8), torch.float32, torch.bfloat16)
    need(lt)
    assert called(lt) == FORWARD_AND_BACKWARD
    assert models[1][0].bias.grad.dtype == torch.float32


@pytest.mark.parametrize("forward", [True, False])
def test_tf32_switched_between_forward_and_backward(lt, forward):
    """Which products there are depends on it: backward follows what forward found."""
    products = torch.backends.cuda.matmul
    products.fp32_precision = "tf32" if forward else "ieee"
    _, model = twins(mlp(24, 136, 8), lt)
    y = model(torch.randn(4, 24, device=lt.device))
    products.fp32_precision = "ieee" if forward else "tf32"
    y.sum().backward()
    if lt.device == "cpu":  # the stand-in has float32 with TF32 only
        assert called(lt) == (FORWARD_AND_BACKWARD if forward else [])
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("bias"))


def test_only_where_both_products_exist(lt):
    if lt.device == "cuda":
        pytest.skip("what exists is not known")
    compare(twins(mlp(24, 136, 6), lt), lt, (24, 6), torch.float32)  # not the one above
    compare(twins(mlp(6, 136, 8), lt), lt, (6, 8), torch.float32)  # not the layer's own
    assert not called(lt)
    assert "activate_grad" in lt.calls  # linked all the same


def test_dropout_is_not_linked_while_it_drops(lt, monkeypatch):
    models = twins(mlp(24, 136, 8, dropout=True), lt)
    for model in models:
        model.eval()
    compare(models, lt, (24, 8), torch.float32)
    need(lt)
    assert called(lt) == FORWARD_AND_BACKWARD
    models[1].train()
    lt.calls.clear()
    if lt.device == "cpu":  # where random numbers are drawn before the product
        monkeypatch.setattr(autograd, "ops", torch.ops.wus)
    models[1](torch.randn(4, 24, device=lt.device)).sum().backward()
    assert not lt.calls


def test_a_layer_above_that_does_not_skip(lt):
    models = twins(mlp(24, 136, 8), lt)
    for model in models:
        wus_ext.set_skip(model, False, layers="2")
    compare(models, lt, (24, 8), torch.float32)
    assert not called(lt)


def test_nobody_else_reads_the_mask(lt):
    """Whoever takes the output without knowing cuBLASLt's masks gets the right gradients."""
    linear = nn.Linear(24, 136).to(lt.device)
    x = torch.randn(8, 24, device=lt.device, requires_grad=True)
    if not linked.suits_cublaslt(x, 136, 8):
        pytest.skip("this cuBLASLt has no such product")
    layer = linked.LinearLayer(products.Products(linear.weight.detach()), True, 0.0,
                               opaque=True, below_opaque=False)  # fmt: skip
    held = linked.linked(layer, x, linear.bias, None, None, hold=True)
    assert held.opaque
    g = torch.randn(8, 136, device=lt.device)
    actual = torch.autograd.grad(held.settled(), (x, linear.bias), g)
    expected = torch.autograd.grad(linear(x).relu(), (x, linear.bias), g)
    for mine, theirs in zip(actual, expected, strict=True):
        tolerance = 2e-3 if lt.device == "cuda" else 1e-5
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("real_gpu")
def test_captured_in_a_graph():
    model = mlp(64, 256, 16).to("cuda", torch.bfloat16)
    wus_ext.set_skip(wus_ext.convert(model, epilogues=("cublaslt",)), True)
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    g = torch.randn(32, 16, device="cuda", dtype=torch.bfloat16)
    check_replay(model, x, g)
