"""Chains in bfloat16 on the CPU, under autocast and of whole models, as exact as stock's."""

from __future__ import annotations

import contextlib
import copy
from statistics import geometric_mean

import pytest
import torch
from torch import Tensor, nn

import wus_ext

from .chains import CHAINS, Block, frozen, fused_chains, images, recorded, stock_chain

NAMES = [name for name in CHAINS if name != "dropout"]  # whose masks float64 does not draw alike
settings = pytest.mark.parametrize("full", ["fused", "stock"], ids=["fused", "skip"])
precisions = pytest.mark.parametrize("whole", [False, True], ids=["autocast", "model"])
DEPTHWISE = {
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 16, 5, 1, 2, groups=16), nn.SiLU(), nn.Conv2d(16, 8, 1), nn.Hardswish(),
    ),
}  # fmt: skip


def low(whole: bool) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if whole else torch.autocast("cpu", torch.bfloat16)


def step(model: nn.Module, x: Tensor, grad: Tensor, whole: bool) -> dict[str, Tensor]:
    """All that a step computes."""
    x = x.detach().requires_grad_()
    with low(whole):
        output = model(x)
    output.backward(grad.to(output.dtype))
    results = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return {"output": output.detach(), "input": x.grad, **results, **buffers}


def models(name: str, full: str, whole: bool) -> tuple[nn.Module, nn.Module, nn.Module, Tensor]:
    """Stock in bfloat16, ours, stock in float64 of the same values, and an input."""
    if name in DEPTHWISE:
        torch.manual_seed(0)
        stock = DEPTHWISE[name]().to(memory_format=torch.channels_last)
    else:
        stock = stock_chain(name)
        for module in stock.modules():  # made before any seed
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()
    x = images((16, 3, 24, 20))
    if whole:
        stock, x = stock.bfloat16(), x.bfloat16()
    ours = wus_ext.convert(copy.deepcopy(stock), full=full)
    if full == "stock":
        wus_ext.set_skip(ours, True)
        frozen(stock)
    return stock, ours, copy.deepcopy(stock).double(), x


def errors(name: str, full: str, whole: bool, seed: int) -> dict[str, tuple[float, float]]:
    """Of everything that a step computes, ours and stock's, in parts of what it should be."""
    stock, ours, exact, x = models(name, full, whole)
    torch.manual_seed(seed)
    x = torch.randn_like(x)
    with torch.no_grad():
        grad = torch.randn(copy.deepcopy(exact)(x.double()).shape).bfloat16()
    with recorded(ours) as chains:
        actual = step(ours, x, grad, whole)
    assert chains, "it ran layer by layer"
    theirs, true = step(stock, x, grad, whole), step(exact, x.double(), grad.double(), True)
    assert actual.keys() == theirs.keys()
    largest = max(true[part].norm() for part, _ in stock.named_parameters() if part in true)
    found = {}
    for part, expected in true.items():
        mine, stocks = actual[part], theirs[part]
        assert (mine.dtype, mine.shape) == (stocks.dtype, expected.shape), part
        # In front of batch statistics a bias has a gradient of zero.
        size = (expected.norm() + (0.03 * largest if part.endswith("bias") else 0)).clamp(min=1e-9)
        found[part] = tuple(((g.double() - expected).norm() / size).item() for g in (mine, stocks))
    return found


@precisions
@settings
@pytest.mark.parametrize("name", [*NAMES, *DEPTHWISE])
def test_as_exact_as_stock(name, full, whole):
    """In the mean of all that a step computes: of one gradient either may be luckier, in deciding
    where a slope jumps, and is nowhere much worse."""
    steps = [errors(name, full, whole, seed) for seed in range(3)]
    ratios = {}
    for part in steps[0]:
        mine, theirs = (geometric_mean(step[part][i] + 2e-3 for step in steps) for i in range(2))
        assert mine <= 5 * theirs, f"{part}: {mine:.1e}, stock {theirs:.1e}"
        ratios[part] = mine / theirs
    assert geometric_mean(ratios.values()) <= 1.3, ratios


@precisions
@pytest.mark.parametrize("name", ["conv_norm_relu_pool", "block", "linear"])
def test_what_is_saved_is_half_of_float32s(name, whole):
    def saved(model: nn.Module, x: Tensor, whole: bool) -> int:
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.nbytes) or t, lambda t: t
        )
        with hooks, low(whole):
            model(x.requires_grad_())
        return sum(sizes)

    _, ours, _, x = models(name, "stock", whole)
    stock, single, _, wide = models(name, "stock", False)
    assert saved(ours, x, whole) <= 0.75 * saved(single, wide, True)
    assert saved(ours, x, whole) < 0.7 * saved(stock.requires_grad_(True), wide, False)


@precisions
def test_batch_norm_joins_with_parameters_of_either_type(whole):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Block(16))
    if whole:
        model = model.bfloat16()
    wus_ext.convert(model, full="fused")
    x = images().bfloat16() if whole else images()
    with low(whole):
        chains = fused_chains(model, x)
    assert chains == ["conv relu", "conv norm relu", "conv norm", "conv norm add relu"]


@precisions
def test_evaluation_in_a_window(whole):
    stock, ours, exact, x = models("conv_norm_relu_pool", "stock", whole)
    for model in (stock, ours, exact):
        model.eval()
    large = x.repeat(4, 1, 8, 8)
    with torch.no_grad():
        with recorded(ours) as chains, low(whole):
            actual = ours(large)
        with low(whole):
            theirs = stock(large)
        true = exact(large.double())
    assert chains
    assert actual.dtype == theirs.dtype == torch.bfloat16
    assert (actual - true).norm() <= 1.5 * (theirs - true).norm() + 1e-3 * true.norm()


@precisions
def test_dropout_is_stocks(whole):
    """The same numbers of the same generator."""
    stock, ours, _, x = models("dropout", "fused", whole)
    outputs = []
    for model in (ours, stock):
        torch.manual_seed(1)
        with low(whole):
            outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=3e-2, atol=3e-3)


@settings
def test_a_window_casts_weights_once(full):
    _, ours, _, x = models("conv_norm_relu", full, False)
    wus_ext.set_skip(ours, True)
    packed = ours._skip_engine.packed
    grad = torch.ones(16, 16, 24, 20)
    step(ours, x, grad, False)
    first = {key: c.tensor.data_ptr() for own in packed._layers.values() for key, c in own.items()}
    step(ours, x, grad, False)
    again = {key: c.tensor.data_ptr() for own in packed._layers.values() for key, c in own.items()}
    assert first
    assert first == again
